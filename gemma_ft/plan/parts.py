"""The arithmetic of memory, part by part: of one device, in bytes, at the moment where the part is largest."""

from __future__ import annotations

from gemma_ft.plan.activations import WIDE, checkpointed_bytes, saved_bytes, workspace_bytes
from gemma_ft.plan.run import Run
from gemma_ft.plan.shape import Shape
from gemma_ft.plan.storage import BYTES, cache_bytes, layer_bytes, moment_bytes, weight_bytes
from gemma_ft.system.limits import CHUNK_BYTES, CPU_BYTES, CPU_ROWS, PREFILL_TOKENS, ROWS_NUMBERS, WEIGHT_NUMBERS

CUDA_CONTEXT = 3 * 2**28  # of a process: driver, cuBLAS workspaces; assumed, and measured nowhere yet
CPU_PROCESS = 3 * 2**28  # torch and the libraries around it, with a first use of their kernels


def weights(run: Run) -> int:
    """The model's weights on one rank. FSDP2: a slice, the root (embedding, final norm) whole, and two layers whole:
    the one that computes and the one that is fetched meanwhile; all layers where they are not cut again after forward.
    """
    shape = run.shape
    whole = weight_bytes(shape, run.kind, double_quant=run.double_quant, rest=run.precision)
    if run.ranks.cut == 1:
        return whole
    layer = layer_bytes(shape, run.kind, double_quant=run.double_quant) + shape.layer_norms * run.rest
    gathered = 2 if run.ranks.reshard_after_forward else shape.layers
    sliced = 0 if run.ranks.offload else -(-whole // run.ranks.cut)
    return sliced + gathered * layer + (shape.embedding + shape.hidden) * run.rest


def narrow_copies(run: Run) -> int:
    """bf16 copies of float32 weights that autocast makes in forward and keeps for backward; of layers that are
    checkpointed they go with the forward, and are whole at its end.
    """
    if not run.full or run.precision == "float32":
        return 0
    return BYTES["bf16"] * (run.shape.layers * run.shape.layer_linear + run.shape.embedding)


def trained(run: Run) -> int:
    """Adapter weights: float32, beside the model's, and the frozen copy of those that a run starts from, where it is
    compared with them. Those of a run that trains all are `weights`.
    """
    if run.full or run.ranks.offload:
        return 0
    copies = 2 if run.reference == "start" else 1
    return copies * -(-WIDE * run.trained // run.ranks.cut)


def gradients(run: Run) -> int:
    """Gradients in float32; DDP has its buckets beside them. FSDP2: those of adapters stay whole until the step, those
    of a whole model are cut layer by layer.
    """
    whole = WIDE * run.trained
    if run.ranks.layout == "ddp":
        return 2 * whole
    if run.ranks.cut == 1:
        return whole
    if not run.full:
        return whole + (0 if run.ranks.offload else -(-whole // run.ranks.cut))
    unit = WIDE * max(2 * run.shape.layer_linear, run.shape.embedding)
    return unit + (0 if run.ranks.offload else -(-whole // run.ranks.cut))


def optimizer(run: Run) -> int:
    """What the optimizer keeps of each weight."""
    return 0 if run.ranks.offload else -(-moment_bytes(run.trained_tensors, run.optimizer) // run.ranks.cut)


def activations(run: Run) -> int:
    """What layers keep for backward when a forward pass is over, and the angles that they share."""
    layer = run.layer
    kept = run.shape.layers - run.checkpointed
    return (
        run.sequences
        * run.tokens
        * (_angles(run.shape) + run.checkpointed * checkpointed_bytes(layer) + kept * saved_bytes(layer))
    )


def recomputed(run: Run) -> int:
    """What is kept while a single layer is left that is not checkpointed, or is being computed again: the inputs of
    checkpointed ones, as if all were (to take the last one as well is then never more), and all of its own.
    """
    inputs = run.shape.layers * checkpointed_bytes(run.layer) if run.checkpointed else 0
    return run.sequences * run.tokens * (_angles(run.shape) + inputs + saved_bytes(run.layer))


def _angles(shape: Shape) -> int:
    """Bytes for each token of the cosines and sines of a pass."""
    return shape.angles * 2 * shape.head_dim * WIDE


def workspace(run: Run) -> int:
    """What a layer's backward takes beside what was kept, and one dequantized weight."""
    return run.sequences * run.tokens * workspace_bytes(run.layer) + dequantized(run)


def dequantized(run: Run) -> int:
    """A quantized weight that is being computed with, the largest one."""
    return run.shape.largest_linear * run.element if run.kind in ("nf4", "int8") else 0


def head(run: Run, sequences: int, *, backward: bool = True) -> int:
    """The fused head over all tokens of so many sequences as if all were labelled: states around the final norm, rows
    picked out, their gradient, and a chunk of logits; a trained head also has its own gradient and copy of itself. A
    reward model reads one row of each answer, and has no logits.
    """
    shape, tokens, element = run.shape, sequences * run.tokens, run.element
    if run.scores:
        return tokens * shape.hidden * (WIDE + (2 * element if backward else element))
    chunk = max(16, CHUNK_BYTES // (WIDE * shape.vocabulary))
    if run.device == "cpu":
        chunk = min(chunk, max(CPU_ROWS, CPU_BYTES // (WIDE * shape.vocabulary)))
    around = tokens * shape.hidden * (WIDE + 3 * run.element + (run.element if backward else 0))
    total = around + min(chunk, tokens) * shape.vocabulary * logit_bytes(run)
    if run.full and backward:  # its gradient, and what one chunk adds to it
        total += (WIDE + element) * shape.embedding
    return total


def logit_bytes(run: Run) -> int:
    """Bytes of each logit while its loss is computed: as multiplied, wide, tanh and capped, and their exponential; in
    C++ its gradient takes its place.
    """
    if run.own_kernels:
        return run.element
    narrow = 0 if run.element == WIDE else run.element
    return narrow + (3 if run.shape.final_softcap else 2) * WIDE


def forward_only(run: Run, rows: int, tokens: int, *, keys: int, cached: bool) -> int:
    """What a layer needs without gradients, for `rows` sequences of `tokens` that meet `keys` keys each; with a cache
    every score is written out.
    """
    shape, element = run.shape, run.element
    if run.own_kernels and (run.full or run.layer.fused):
        wide, parts_of_ffn = element, 3 * element
    else:  # wide copies of norms and adapters, and a product's own buffer
        wide, parts_of_ffn = WIDE, (3 * element if run.full else 2 * element + 2 * WIDE) + WIDE
    states = 4 * shape.hidden * wide + shape.ffn * parts_of_ffn
    states += 2 * (shape.heads + shape.kv_heads) * shape.head_dim * element
    written = cached or run.attention == "scores"
    scores = shape.heads * keys * (element + 3 * WIDE) if written else 0
    return rows * tokens * (states + scores) + dequantized(run)


def cache(run: Run) -> int:
    """Keys and values of the answers of an evaluation."""
    longest = run.tokens + run.new_tokens
    return cache_bytes(run.shape, longest, rows=run.eval_rows, limit=longest, element=run.element)


def prefill(run: Run) -> int:
    """One pass over a piece of a prompt, and logits for all rows that speak."""
    logits = run.eval_rows * run.shape.vocabulary * (run.element + 4 * WIDE)
    piece, keys = min(PREFILL_TOKENS, run.tokens), run.tokens + run.new_tokens
    return max(forward_only(run, 1, piece, keys=keys, cached=True), logits)


def widened(run: Run, tokens: int, *, head: bool = True) -> int:
    """What products in bf16 are computed from and into where they are float32, kept from one to the next: a part of
    the largest weight, of the head's where that is multiplied too, and some of `tokens` rows of what goes in and out.
    """
    if not run.widened or run.precision == "float32":
        return 0
    weight = run.shape.embedding if head else run.shape.largest_linear
    rows = min(ROWS_NUMBERS, tokens * max(run.shape.ffn, run.shape.hidden))
    return WIDE * (min(weight, WEIGHT_NUMBERS) + 2 * rows)


def overhead(run: Run) -> int:
    """What a process takes before it has a model."""
    return CUDA_CONTEXT if run.device == "cuda" else CPU_PROCESS
