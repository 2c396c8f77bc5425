"""What a run minimizes: one block for each kind, with the keys of that kind alone, and what the kind takes by default
elsewhere in a recipe.

Sources of the defaults: the papers that train/objectives/ names; learning rates are judgement.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from gemma_ft.recipe.section import Location, Section, rule
from gemma_ft.system.row_kind import RowKind

LIVE = ("adapter_off", "start")  # references that are the policy's own model in another state
WORDS = ("auto", *LIVE, "precomputed")


class SupervisedFineTuning(Section):
    """Cross-entropy of the answers."""

    rows: ClassVar[RowKind] = "answers"
    needs_reference: ClassVar[bool] = False
    kind: Literal["sft"] = Field("sft", description="Supervised fine-tuning on prompts and answers")


class Preference(Section):
    """What all kinds that learn from preferences share."""

    rows: ClassVar[RowKind] = "pairs"
    needs_reference: ClassVar[bool] = False
    kind: str
    dropout: bool = Field(False, description="Whether adapter.dropout is used; it would blur what is compared")


class _Answering(Preference):
    """What is trained writes answers."""

    judge: Location | None = Field(
        None,
        description="Who says how often held-out answers got better: FILE.py:function, a reward model, or a metric",
    )


class _Compared(_Answering):
    needs_reference: ClassVar[bool] = True
    reference: Location = Field(
        "auto",
        description="Whose log-probabilities are compared with: auto, adapter_off, start, precomputed, or a folder",
    )

    @field_validator("reference")
    @classmethod
    def _no_near_word(cls, value: str) -> str:
        if value.lower().replace("-", "_") in WORDS and value not in WORDS:
            raise rule("expected auto, adapter_off, start, precomputed or a folder, got {got}", got=value)
        return value


SftWeight = Annotated[float, Field(ge=0, le=1000)]
Beta = Annotated[float, Field(gt=0, le=1000)]
_SFT_WEIGHT = "Adds so much of the cross-entropy of the chosen answers, a mean over their tokens"


class DirectPreference(_Compared):
    """-log sigmoid(beta x margin of log-ratios)."""

    kind: Literal["dpo"] = Field(description="Direct preference optimization")
    beta: Beta = Field(0.1, description="How strongly the policy is held to the reference")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="Share of pairs whose halves may be swapped (cDPO)")
    length_normalized: bool = Field(False, description="Log-ratios per token instead of summed")
    sft_weight: SftWeight = Field(0.0, description=_SFT_WEIGHT)


class IdentityPreference(_Compared):
    """(margin of log-ratios per token - 1 / (2 beta))^2."""

    kind: Literal["ipo"] = Field(description="Identity preference optimization")
    beta: Beta = Field(0.1, description="How strongly the policy is held to the reference")
    sft_weight: SftWeight = Field(0.0, description=_SFT_WEIGHT)


class OddsRatio(_Answering):
    """Cross-entropy of the chosen answers plus beta x odds-ratio term; no reference."""

    kind: Literal["orpo"] = Field(description="Odds ratio preference optimization")
    beta: Beta = Field(0.1, description="Weight of the odds-ratio term (the paper's lambda)")


class SimplePreference(_Answering):
    """-log sigmoid(beta x margin of log-probabilities per token - gamma); no reference."""

    kind: Literal["simpo"] = Field(description="Simple preference optimization")
    beta: Beta = Field(2.0, description="Scale of the rewards")
    gamma: float = Field(1.0, ge=0, le=1000, description="Margin that is asked for")
    sft_weight: SftWeight = Field(0.0, description=_SFT_WEIGHT)


class KahnemanTversky(_Compared):
    """Rows that are called good or bad one by one."""

    rows: ClassVar[RowKind] = "labelled"
    kind: Literal["kto"] = Field(description="Kahneman-Tversky optimization")
    beta: Beta = Field(0.1, description="How strongly the policy is held to the reference")
    desirable_weight: float | None = Field(
        None, gt=0, le=1000, description="Of rows with label true; both not set: so that neither label outweighs"
    )
    undesirable_weight: float | None = Field(None, gt=0, le=1000, description="Of rows with label false")


class RewardModel(Preference):
    """-log sigmoid(margin of rewards): a model that scores."""

    kind: Literal["reward"] = Field(description="Reward model (Bradley-Terry)")
    centering: float = Field(0.01, ge=0, le=1000, description="Weight of (sum of both rewards)^2")


def reference_kind(objective: SupervisedFineTuning | Preference, strategy: str, start: str | None) -> str:
    """What the log-probabilities of an objective are compared with: none, adapter_off, start, precomputed (by the model
    as it is before training), or a folder.

    Raises: PydanticCustomError for one that this run cannot have.
    """
    if not isinstance(objective, _Compared):
        return "none"
    wanted, key = objective.reference, "objective.reference"
    if wanted == "auto":
        return "precomputed" if strategy == "full" else "adapter_off" if start is None else "start"
    if wanted in ("adapter_off", "start") and strategy == "full":
        raise rule(f"{wanted}: strategy full has no adapter; use precomputed", key=key)
    if wanted == "adapter_off" and start is not None:
        raise rule(
            "adapter_off is the base, and training goes on from adapter.start; use start, or precomputed", key=key
        )
    if wanted == "start" and start is None:
        raise rule("start is the adapter that adapter.start names, and there is none; use adapter_off", key=key)
    return wanted


def check_objective(
    objective: SupervisedFineTuning | Preference, strategy: str, start: str | None, data: Any, train: Any
) -> None:
    """Raises: PydanticCustomError where an objective cannot be computed on such data, or compared as it says."""
    reference = reference_kind(objective, strategy, start)
    if data.streaming and reference not in ("none", "adapter_off", "start"):
        raise rule(
            f"data.streaming: log-probabilities of the reference ({reference}) are computed once before training, over "
            "rows that are all known; turn streaming off, or train an adapter and compare with adapter_off",
            key="objective.reference",
        )
    if objective.kind == "kto" and train.global_batch_size < 2:
        raise rule(
            "kto compares with answers to other rows of a step, and each step has one row; raise it, to 32 or more",
            key="train.global_batch_size",
        )
    if objective.rows != "answers" and data.too_long in ("truncate_right", "split"):
        raise rule(
            f"{data.too_long} takes the end of an answer away, and then it is not compared as it is; use drop, "
            "truncate_left or error",
            key="data.too_long",
        )


Objective = Annotated[
    SupervisedFineTuning
    | DirectPreference
    | IdentityPreference
    | OddsRatio
    | SimplePreference
    | KahnemanTversky
    | RewardModel,
    Field(discriminator="kind"),
]
KINDS: dict[str, type[SupervisedFineTuning] | type[Preference]] = {
    "sft": SupervisedFineTuning,
    "dpo": DirectPreference,
    "ipo": IdentityPreference,
    "orpo": OddsRatio,
    "simpo": SimplePreference,
    "kto": KahnemanTversky,
    "reward": RewardModel,
}

_PAIRS = {"global_batch_size": 64, "warmup_ratio": 0.1}
_RATES = {  # of adapters, and of all weights
    "dpo": (5e-6, 5e-7),
    "ipo": (5e-6, 5e-7),
    "orpo": (5e-5, 8e-6),
    "simpo": (5e-6, 1e-6),
    "kto": (5e-6, 5e-7),
    "reward": (1e-4, 1e-5),
}


def train_defaults(kind: str, strategy: Any) -> dict[str, Any]:
    """What the block `train` has where the recipe does not say it; of sft nothing: the schema's own defaults."""
    if kind not in _RATES:
        return {}
    return {"learning_rate": _RATES[kind][strategy == "full"], **_PAIRS}
