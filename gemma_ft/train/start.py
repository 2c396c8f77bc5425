"""What an objective needs before the first step: the reference's log-probabilities where they are computed once, and
the proof that the run starts at its reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gemma_ft.build.located import folder_of
from gemma_ft.build.place import place_of
from gemma_ft.build.pretrained import load_model, load_tokenizer
from gemma_ft.build.start_adapter import start_of
from gemma_ft.data.encode.tokenizer_files import brings_tokenizer
from gemma_ft.data.pack.preferences import PreferenceExamples
from gemma_ft.errors import UserError, first_line
from gemma_ft.evaluate.judge import judge_of
from gemma_ft.evaluate.win_rate import win_rate
from gemma_ft.model.config import numerics_hash
from gemma_ft.model.config_file import is_reward_model
from gemma_ft.recipe.objectives import LIVE, reference_kind
from gemma_ft.recipe.schema import Recipe
from gemma_ft.system import environment, hardware
from gemma_ft.train.precompute import precompute
from gemma_ft.train.result import base_fingerprint
from gemma_ft.train.run_context import TrainingLoop
from gemma_ft.train.zero_proof import zero_proof

HERE = "precomputed"  # by the model of the run, as it is before training
REFERENCE = "objective.reference"
UNUSED = "<unused"  # begins the names of ids that no text becomes


def check_reference(recipe: Recipe, tokenizer: Any) -> None:
    """Before anything is built: a folder that is compared with holds a language model in which `tokenizer`'s ids stand
    for the same pieces. Raises: UserError.
    """
    start = recipe.adapter.start if recipe.adapter is not None else None
    kind = reference_kind(recipe.objective, recipe.strategy, start)
    if kind in ("none", HERE, *LIVE):
        return
    try:
        place = place_of(kind)
        place.check()
    except UserError as error:
        raise UserError(f"{REFERENCE}: {error}") from error
    if place.reward:
        raise UserError(
            f"{REFERENCE}: {kind}: a reward model, which gives no log-probabilities; name the model that it was made "
            "from, or one that was tuned to answer"
        )
    if not brings_tokenizer(place.folder):
        return
    theirs, own = (
        {number: piece for piece, number in one.get_vocab().items()}
        for one in (load_tokenizer(str(place.folder)), tokenizer)
    )
    for number, piece in sorted(own.items()):
        other = theirs.get(number, "nothing")
        if other != piece and not piece.startswith(UNUSED) and not other.startswith(UNUSED):
            raise UserError(
                f"{REFERENCE}: {kind}: has another tokenizer: id {number:,} is {other!r} there, and {piece!r} here; "
                "name a model with the same one"
            )


def call_judge(loop: TrainingLoop) -> None:
    """Give the run the judge that its recipe names. A user's file is executed here, and so only after a checkpoint has
    said whether it is the one that the run began with. All ranks call it. Raises: UserError.
    """
    context = loop.context
    named = getattr(context.recipe.objective, "judge", None)
    if named is None:
        return
    if not loop.scorer.questions:
        raise UserError(
            "objective.judge: there is no held-out answer to judge; set data.eval or data.eval_fraction, and "
            "eval.generate_rows"
        )
    encoder, size, known = context.data.encoder, context.recipe.eval.batch_size, loop.progress.extra["inputs"]
    loop.judge = judge_of(named, encoder, batch_size=size, sha256=known.get("judge"))


def prepare_objective(loop: TrainingLoop, *, begins: bool) -> None:
    """`begins`: the run has no step yet, and is proven to start right. All ranks call it. Raises: UserError."""
    trainer, context = loop.trainer, loop.context
    kind = trainer.reference.kind
    if kind not in ("none", *LIVE):
        with context.world.phase("the reference"):
            _compute(loop, kind)
    if not begins or trainer.objective.rows == "answers":
        return
    context.observer.say(f"  start      {_proven(loop)}")


def _proven(loop: TrainingLoop) -> str:
    """Where the run starts, in words; what was found is kept for the summary. Raises: UserError, as zero_proof."""
    trainer, kind, source = loop.trainer, loop.trainer.reference.kind, loop.context.source
    scores = trainer.objective.scores
    if scores and source is not None and is_reward_model(folder_of(source, downloaded=True)):
        return f"none: the head of {source.name} is trained already"
    with loop.context.world.phase("the proof of the start"):
        proof = zero_proof(trainer)
    if proof is None:
        return "none: there is no reference" if kind == "none" else f"none: compared with {kind}"
    loop.progress.extra["zero_proof"] = proof.as_dict()
    return proof.told(scores=scores)


def judged(loop: TrainingLoop, answers: Sequence[str]) -> dict[str, Any] | None:
    """How often the answers after training are better than those before, by the judge of the run; None without one,
    and where it raised, which is told and costs no run.
    """
    context, judge = loop.context, loop.judge
    before = loop.progress.extra["before"]["answers"]
    questions = loop.scorer.questions[: min(len(before), len(answers))]
    if judge is None or not questions or not context.world.main:
        return None
    before, answers = before[: len(questions)], list(answers)[: len(questions)]
    try:
        both = judge.scores([*questions, *questions], [*before, *answers])  # at once: a judge may be a model
        scores = both[: len(before)], both[len(before) :]
    except (Exception, SystemExit) as error:  # a user's own function may raise anything
        context.observer.say(f"  judge      {judge.name}: {first_line(error, kind=True)}; no win rate")
        return None
    lengths = [(len(one), len(other)) for one, other in zip(before, answers, strict=True)]
    found = {"judge": judge.name, "sha256": judge.sha256, **win_rate(scores[0], scores[1], lengths)}
    at_equal = found["length_controlled"]
    controlled = "equal lengths cannot be told" if at_equal is None else f"{at_equal:.1%} at equal lengths"
    context.observer.say(
        f"  judge      {judge.name}: {found['value']:.1%} of {found['rows']} answers are better than before (ties "
        f"count half), {controlled}; mean length {found['length_before']:.0f} -> "
        f"{found['length_after']:.0f} characters"
    )
    return found


def _compute(loop: TrainingLoop, kind: str) -> None:
    context, trainer, recipe = loop.context, loop.trainer, loop.context.recipe
    dtype = recipe.train.precision
    shared = [hardware.default_device().type, dtype, environment.own_kernels_wanted()]
    found = [one for one in (trainer.data.train, trainer.data.held_out) if isinstance(one, PreferenceExamples)]
    count = sum(len(one.pieces) for one in found)
    with context.observer.job("reference answers", count) as job:
        if kind == HERE:
            model, identity = trainer.model, _identity(loop)
        else:
            if context.world.layout == "fsdp2":
                raise UserError(f"{REFERENCE}: {kind} is whole on each device; use --launch ddp")
            place = place_of(kind)
            model = load_model(kind, dtype=hardware.dtype_by_name(dtype), quantize="auto")
            identity = [place.of_base.weights.fingerprint(), place.of_adapter.hash if place.of_adapter else None]
        precompute(trainer, model, [kind == HERE, *identity, *shared], advance=job.advance)


def _identity(loop: TrainingLoop) -> list[Any]:
    """What decides the model of the run as it is before training."""
    context, recipe = loop.context, loop.context.recipe
    start = recipe.adapter.start if recipe.adapter is not None else None
    return [
        recipe.strategy,
        base_fingerprint(context.source) or f"fresh {recipe.seed}",
        start_of(start).hash if start is not None else None,
        recipe.quantize.model_dump() if recipe.quantize is not None else None,
        numerics_hash(context.model.config),
        context.model.config._attn_implementation,
    ]
