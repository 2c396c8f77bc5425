"""The phases of a run, each with what it takes of one device, of its host, and of the disk."""

from __future__ import annotations

from dataclasses import dataclass, field

from gemma_ft.plan import parts
from gemma_ft.plan.activations import WIDE
from gemma_ft.plan.run import Run
from gemma_ft.plan.storage import BYTES, moment_bytes, weight_bytes
from gemma_ft.recipe.objectives import LIVE
from gemma_ft.system.limits import MAX_SHARD_BYTES, PREFILL_TOKENS


@dataclass(frozen=True)
class Phase:
    """What a phase takes at its peak: of one device by part, and of the host's memory for one rank, in bytes.

    On a CPU the device is the host: `host` is then what comes on top.
    """

    name: str
    device: dict[str, int] = field(default_factory=dict)
    host: int = 0

    @property
    def total(self) -> int:
        """Bytes of the device."""
        return sum(self.device.values())


def train_phase(run: Run) -> Phase:
    """An optimizer step at the largest of its moments."""
    return max(train_moments(run), key=lambda phase: phase.total)


def train_moments(run: Run) -> list[Phase]:
    """A step's moments: the reference's pass, where there is one; at the head, forward being over; a layer's backward,
    first and last; the embedding's; the optimizer.

    Gradients of a first micro-batch are there while a second one is computed. A trained embedding has two gradients in
    a pass, the head's and its own: autograd holds the first until the second is there, and adds their sum to what
    former micro-batches left.
    """
    always = {"weights": parts.weights(run), "adapters": parts.trained(run), "optimizer": parts.optimizer(run)}
    always |= _products(parts.widened(run, run.sequences * run.tokens, head=not run.scores))
    gradients, kept = parts.gradients(run), parts.activations(run)
    former = gradients if run.accumulation_steps > 1 else 0
    embedding = WIDE * run.shape.embedding if run.full else 0
    waiting = embedding if former and run.ranks.cut == 1 else 0  # else of `gradients`, where it takes no place yet
    begun = max(former + waiting, embedding) if run.full else gradients
    copies = parts.narrow_copies(run)
    alive = copies * (run.shape.layers - run.checkpointed) // run.shape.layers

    def at(gradients: int, activations: int, head: int = 0) -> Phase:
        found = {"gradients": gradients, "activations": activations, "head": head, "overhead": parts.overhead(run)}
        return Phase("train", always | found, host=_rank_host(run))

    asked = _forward(run, run.sequences)
    return [
        *([at(former, asked.get("activations", 0), asked.get("head", 0))] if run.reference != "none" else []),
        at(former, kept + copies, parts.head(run, run.sequences)),
        at(begun, kept + alive + parts.workspace(run)),
        at(gradients + waiting, parts.recomputed(run) + parts.workspace(run)),
        at(gradients + waiting + embedding, 0),
        at(gradients, 0),
    ]


def phases(run: Run) -> list[Phase]:
    """All phases of a run, in order; those after training are those of its result."""
    resident = {
        "weights": parts.weights(run), "adapters": parts.trained(run), "overhead": parts.overhead(run)
    }  # fmt: skip
    held = resident | {"optimizer": parts.optimizer(run)}
    scoring = _products(parts.widened(run, run.eval_sequences * run.tokens, head=not run.scores))
    reading = _products(parts.widened(run, PREFILL_TOKENS, head=False))  # of the head few rows are read
    found = [_load(run)]
    if run.kind in ("nf4", "int8"):
        found.append(_quantize(run))
    if run.reference not in ("none", *LIVE):
        found.append(_reference(run))
    found += [
        train_phase(run),
        Phase("evaluate", held | scoring | _forward(run, run.eval_sequences), _rank_host(run)),
    ]
    if run.answers:
        answers = {"activations": parts.prefill(run), "cache": parts.cache(run)}
        found.append(Phase("generate", held | reading | answers, _rank_host(run)))
    if not run.full:
        found.append(_merge(run))
    return found


@dataclass(frozen=True)
class Disk:
    """Bytes on the disk."""

    download: int
    checkpoints: int
    result: int
    merged: int


def disk(run: Run) -> Disk:
    """Weights as published (bf16), with what lies beside a text model; checkpoints (weights that are trained, and their
    moments), the result, a merge.
    """
    published = BYTES["bf16"] * run.shape.parameters
    return Disk(
        download=published + BYTES["bf16"] * run.shape.beside,
        checkpoints=run.checkpoints * (WIDE * run.trained + moment_bytes(run.trained_tensors, run.optimizer)),
        result=run.element * run.shape.parameters if run.full else WIDE * run.trained,
        merged=0 if run.full else published,
    )


def _load(run: Run) -> Phase:
    """Weights on their way to the device: a file is mapped, and read tensor by tensor; what was read stays in the page
    cache, which the system takes back. Under FSDP rank 0 reads, and has one tensor and its copy for the others.
    """
    tensor = max(run.shape.embedding, run.shape.largest_linear)
    device = {"weights": parts.weights(run), "overhead": parts.overhead(run)}
    if run.kind in ("nf4", "int8"):
        device["weights"] = (run.shape.embedding + run.shape.norm_weights) * run.rest
    copies = 2 * tensor * run.rest if run.ranks.cut > 1 else tensor * run.rest
    return Phase("load", device, host=copies + _process(run))


def _quantize(run: Run) -> Phase:
    """The largest linear layer in 16 bits, and wide, beside what is quantized already."""
    linear = run.shape.largest_linear
    device = {"weights": parts.weights(run), "activations": linear * (run.element + WIDE)}
    return Phase("quantize", device | {"overhead": parts.overhead(run)}, host=linear * run.element + _process(run))


def _forward(run: Run, sequences: int) -> dict[str, int]:
    """A pass without gradients over so many sequences: its layers, or its head, one after the other."""
    layer = parts.forward_only(run, sequences, run.tokens, keys=run.tokens, cached=False)
    head = parts.head(run, sequences, backward=False)
    return {"activations": layer} if layer > head else {"head": head}


def _reference(run: Run) -> Phase:
    """Log-probabilities that are computed once before training: by the model itself, or by another one beside it, which
    is taken to be of its size and not quantized.
    """
    weights = parts.weights(run)
    if run.reference != "precomputed":
        weights += weight_bytes(run.shape, run.precision)
    device = {"weights": weights, "adapters": parts.trained(run), "overhead": parts.overhead(run)}
    device |= _products(parts.widened(run, run.sequences * run.tokens))
    return Phase("reference", device | _forward(run, run.sequences), _rank_host(run))


def _merge(run: Run) -> Phase:
    """A shard as it is written, and one tensor in float32; the certificate has the trained model and the merged one
    side by side on the device.
    """
    published = BYTES["bf16"] * run.shape.parameters
    shard = min(MAX_SHARD_BYTES, published)
    tensor = WIDE * run.shape.largest_linear
    device = {
        "weights": weight_bytes(run.shape, run.kind, double_quant=run.double_quant, rest=run.precision) + published,
        "adapters": WIDE * run.trained,
        "overhead": parts.overhead(run),
    }
    return Phase("merge", device, host=shard + tensor + _process(run))


def _products(size: int) -> dict[str, int]:
    """Named where there is any."""
    return {"products": size} if size else {}


def _process(run: Run) -> int:
    """A process of the host; on a CPU it is counted as the device's overhead."""
    return parts.CPU_PROCESS if run.device == "cuda" else 0


def _rank_host(run: Run) -> int:
    """Host memory of one rank in training: its process; offloaded, also its slices of weights, gradients, moments."""
    if not run.ranks.offload:
        return _process(run)
    whole = weight_bytes(run.shape, run.kind, double_quant=run.double_quant, rest=run.precision)
    extra = 0 if run.full else WIDE * run.trained
    return _process(run) + -(-(whole + extra + 3 * WIDE * run.trained) // run.ranks.cut)
