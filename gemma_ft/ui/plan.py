"""Plans as text: what `gemma-ft plan` prints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gemma_ft.families.records import PRESETS, PUBLISHED
from gemma_ft.plan.fit import Change, fitted, peak, recomputing, smallest_change
from gemma_ft.plan.gpus import GIB, GPUS, USABLE, USABLE_CPU, smallest_gpu
from gemma_ft.plan.inference import CONTEXTS, table
from gemma_ft.plan.phases import disk, phases
from gemma_ft.plan.run import Ranks, Run, attention_of, run_of
from gemma_ft.plan.shape import Shape, preset_shape
from gemma_ft.plan.storage import BYTES
from gemma_ft.recipe.load import LoadedRecipe
from gemma_ft.system import environment
from gemma_ft.system.shipped import shipped_recipes
from gemma_ft.system.units import byte_size

COLUMNS = ("weights", "adapters", "gradients", "optimizer", "activations", "head", "products", "cache", "overhead")
# of the planned peaks of so many runs on a CPU, measured: docs/memory.md lists them, and a test holds this to it
MEASURED_RUNS, LEAST_ERROR, GREATEST_ERROR = 26, -0.093, 0.04
NOWHERE = "not with any setting; more devices (--launch fsdp2 --nproc N), or a smaller model.preset"


def overview() -> str:
    """The inference table of all published sizes, and what GPUs there are."""
    gpus = [f"  {size:>3} GiB  {names}" for size, names in GPUS.items()]
    left = f"A GPU is taken to have room when {1 - USABLE:.0%} of it is left for its driver and its allocator."
    shapes = [preset_shape(name) for name in PUBLISHED]
    beside = [shape.name for shape in shapes if shape.text_only]
    text = f"Of {', '.join(beside)} the text model is counted: what lies beside it is never read."
    return "\n".join([*inference_lines(shapes), "", "GPUs", *gpus, "", text, left, error_line()])


def error_line() -> str:
    """How far plans were from what was measured."""
    return (
        f"Plans of {MEASURED_RUNS} runs on a CPU were {LEAST_ERROR:+.1%} to {GREATEST_ERROR:+.1%} from the peaks that "
        "were measured (docs/memory.md); no GPU was measured yet."
    )


def model_plan(shape: Shape, gpu: int | None) -> str:
    """Inference and training of one model; `gpu`: bytes of the GPU in question."""
    lines = [
        *inference_lines([shape]),
        "",
        *training_lines(shape, gpu),
        "",
        *_kind_lines(shape),
        *_text_lines(shape),
        error_line(),
    ]
    return "\n".join(lines)


def _kind_lines(shape: Shape) -> list[str]:
    """How many layers are of which kind, where they differ in more than what they see."""
    windows = {window for window in shape.windows if window is not None}
    if shape.angles == 1 or len(windows) != 1:
        return []
    local = sum(window is not None for window in shape.windows)
    return [f"layers: {local} of {shape.layers} see {windows.pop():,} tokens, {shape.layers - local} see all"]


def _text_lines(shape: Shape) -> list[str]:
    """What is not counted of the folder of a text model that other models lie beside."""
    if not shape.text_only:
        return []
    size = f", {gib(BYTES['bf16'] * shape.beside)} GiB," if shape.beside else ""
    return [f"Of {shape.name} the text model alone is read: what lies beside it{size} stays on the disk."]


def inference_lines(shapes: Iterable[Shape]) -> list[str]:
    """The table of weights x quantization x context."""
    rows = [["GiB to answer", "", "weights", *(f"{tokens:,} tokens" for tokens in CONTEXTS), "smallest GPU"]]
    last = ""
    for line in table(shapes):
        gpus = " / ".join(dict.fromkeys(map(_nominal, line.gpus)))
        shown = line.name if line.name != last else ""
        beyond = [""] * (len(CONTEXTS) - len(line.totals))  # the model's longest sequence
        rows.append([shown, line.kind, gib(line.weights), *map(gib, line.totals), *beyond, gpus])
        last = line.name
    return aligned(rows, left=(0, 1, 6))


def training_lines(shape: Shape, gpu: int | None = None) -> list[str]:
    """Training of a model in each strategy at the defaults of a recipe, one sequence at a time."""
    yours = [f"{gib(gpu)} GiB GPU"] if gpu else []
    rows = [["GiB to train", "no layer recomputes", "all layers do", "smallest GPU", *yours]]
    tokens = min(2048, shape.max_positions)
    for label, run in _defaults(shape, tokens):
        every = run.changed(checkpointed=run.shape.layers)
        cells = [label, gib(peak(run)), gib(peak(every)), _nominal(smallest_gpu(peak(every)))]
        rows.append(cells + ([_verdict(smallest_change(run, int(USABLE * gpu), auto=True))] if gpu else []))
    what = f"one sequence of {tokens:,} tokens at a time; LoRA of rank 16 on all linear layers"
    return [*aligned(rows, left=(0, 3, 4)), f"({what})"]


def recipe_plan(loaded: LoadedRecipe, gpu: int | None, ranks: Ranks) -> tuple[str, bool]:
    """The plan of a recipe on a GPU of so many bytes (None: the smallest that has room), and whether it fits there as
    it is.
    """
    recipe = loaded.recipe
    auto = recipe.train.gradient_checkpointing == "auto"
    run = run_of(recipe, ranks=ranks)
    least = run.changed(checkpointed=run.shape.layers) if auto else run
    room = int(USABLE * (gpu or GIB * (smallest_gpu(peak(least)) or max(GPUS))))
    run = fitted(run, room, auto=auto)
    lines = _recipe_lines(loaded, run)
    if gpu:
        change = smallest_change(run, room, auto=auto)
        lines.append(f"{gib(gpu)} GiB GPU: {_verdict(change)}")
        return "\n".join(lines), change is not None and not change.overrides
    changes = {nominal: smallest_change(run, int(USABLE * nominal * GIB), auto=auto) for nominal in GPUS}
    small = [nominal for nominal, change in changes.items() if change is None]
    lines += [f"{max(small):>4} GiB  and less: {NOWHERE}"] if small else []
    lines += [f"{nominal:>4} GiB  {_verdict(change)}" for nominal, change in changes.items() if change is not None]
    return "\n".join(lines), True


def cpu_plan(loaded: LoadedRecipe, memory: int) -> tuple[str, bool]:
    """The plan of a recipe on a machine without a GPU, of so many bytes, and whether it fits there as it is."""
    auto = loaded.recipe.train.gradient_checkpointing == "auto"
    room = int(USABLE_CPU * memory)
    run = fitted(run_of(loaded.recipe, device="cpu"), room, auto=auto)
    change = smallest_change(run, room, auto=auto)
    lines = _recipe_lines(loaded, run)
    nowhere = f"not with any setting; {'strategy=lora' if run.full else 'a smaller model.preset'}, or more memory"
    verdict = _verdict(change, nowhere)
    lines.append(f"{gib(memory)} GiB of memory, {1 - USABLE_CPU:.0%} of it left to the system: {verdict}")
    return "\n".join(lines), change is not None and not change.overrides


def _recipe_lines(loaded: LoadedRecipe, run: Run) -> list[str]:
    """A run, its phases, its disk."""
    notes = [f"note: {note}" for note in loaded.notes]
    disk_lines = [*_disk_lines(run), *_text_lines(run.shape)]
    layers = [*_reference_lines(run), *_kind_lines(run.shape), _layers_line(run)]
    return [*notes, _described(run), "", *_phase_lines(run), "", *disk_lines, *layers, ""]


def gib(size: int) -> str:
    """Bytes in GiB, for a column of them: a dot where they are too few to be seen."""
    return byte_size(size, digits=",.1f").removesuffix(" GiB") if size >= GIB / 20 else "." if size else ""


def aligned(rows: Sequence[Sequence[str]], *, left: Sequence[int]) -> list[str]:
    """Cells in columns, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [[one.ljust(w) if i in left else one.rjust(w) for i, (one, w) in enumerate(zip(row, widths, strict=True))]
             for row in rows]  # fmt: skip
    return ["  ".join(row).rstrip() for row in cells]


def _phase_lines(run: Run) -> list[str]:
    found = phases(run)
    used = [name for name in COLUMNS if any(phase.device.get(name) for phase in found)]
    rows = [["GiB", *used, "device", "host"]]
    for phase in found:
        rows.append([phase.name, *(gib(phase.device.get(name, 0)) for name in used), gib(phase.total), gib(phase.host)])
    return aligned(rows, left=(0,))


def _disk_lines(run: Run) -> list[str]:
    found = disk(run)
    parts = [f"{gib(found.download)} GiB of weights to download", f"{gib(found.checkpoints)} of checkpoints"]
    parts += [f"{gib(found.result)} of tuned model" if run.full else f"{gib(found.result)} of adapter"]
    parts += [f"{gib(found.merged)} of a merge"] if found.merged else []
    return [f"disk: {', '.join(parts)}"]


def _layers_line(run: Run) -> str:
    return f"train.gradient_checkpointing: {recomputing(run)}"


def _described(run: Run) -> str:
    how = {"full": "full", "lora": f"lora, rank {run.rank}", "qlora": f"qlora over {run.quantize}, rank {run.rank}"}
    one = "1 device" if run.device == "cuda" else "the CPU"
    many = one if run.ranks.size == 1 else f"{run.ranks.size} devices ({run.ranks.layout})"
    rows = f"{run.sequences} {_sequence(run)}{'s' * (run.sequences > 1)} of {run.tokens:,} tokens"
    if run.row_sequences > 1:
        rows = f"{run.micro_batch_size} pair{'s' * (run.micro_batch_size > 1)} ({rows})"
    what = [run.shape.name, how[run.strategy], run.precision, *([run.objective] if run.objective != "sft" else [])]
    return f"{', '.join(what)}: {rows} at a time on {many}"


def _sequence(run: Run) -> str:
    """What a sequence is to the objective of a run."""
    return "sequence" if run.objective == "sft" else "answer"


def _reference_lines(run: Run) -> list[str]:
    """What answers are compared with, where they are."""
    told = {
        "adapter_off": "the model without its adapter: no second model in memory",
        "start": "a frozen copy of adapter.start: no second model in memory",
        "precomputed": "log-probabilities of the model as it begins, computed once before training",
    }
    if run.reference == "none":
        return []
    other = f"log-probabilities of {run.reference}, computed once before training, and taken to be of the same size"
    return [f"reference: {told.get(run.reference, other)}"]


def _verdict(change: Change | None, nowhere: str = NOWHERE) -> str:
    if change is None:
        return nowhere
    if change.overrides:
        return f"with {' '.join(change.overrides)}: {gib(peak(change.run))} GiB"
    return f"fits: {gib(peak(change.run))} GiB, {recomputing(change.run)}"


def _nominal(size: int | None) -> str:
    return f"{size} GiB" if size else "none"


def _defaults(shape: Shape, tokens: int) -> list[tuple[str, Run]]:
    attention = attention_of("auto", softcap=shape.attn_softcap, device="cuda")
    own = environment.own_kernels_wanted()
    plain = Run(
        shape=shape, strategy="lora", micro_batch_size=1, tokens=tokens, attention=attention, own_kernels=own,
        fused=own, eval_rows=1,
    )  # fmt: skip
    return [
        ("full", plain.changed(strategy="full", rank=0)),
        ("lora", plain),
        ("qlora, int8", plain.changed(strategy="qlora", quantize="int8")),
        ("qlora, nf4", plain.changed(strategy="qlora", quantize="nf4")),
    ]


def known() -> str:
    """What can be planned, in one line."""
    return f"presets: {', '.join(PRESETS)}; recipes: {', '.join(path.stem for path in shipped_recipes())}"
