"""Numbers that several rooms share: how much is computed or written at a time, which the planner reckons with, and the
label of what is not trained.
"""

IGNORE = -100  # torch's and transformers' label for "not trained"

# The head's loss: of float32 logits at a time; on a CPU so many tokens, or more where the vocabulary is small, which is
# read for each chunk.
CHUNK_BYTES = 256 * 2**20
CPU_ROWS, CPU_BYTES = 256, 64 * 2**20

# Products in float32 of what is stored in bf16: of the weight at a time (64 MiB), of what goes in and comes out (16 MiB
# each).
WEIGHT_NUMBERS, ROWS_NUMBERS = 2**24, 2**22

PREFILL_TOKENS = 512  # of prompts in one pass, padding included: bounds its scores, and how long others wait for it
FIRST_PLACES = 256  # a ring of the KV cache begins with so many places and doubles up to its limit
MAX_SHARD_BYTES = 5 * 10**9  # of a file of weights, of which a merge holds one in memory

# Moments of 8-bit optimizers: numbers that share a scale, and the size of a tensor from which on it has them. Source:
# bitsandbytes optim/optimizer.py.
MOMENT_BLOCK, SMALLEST_IN_8BIT = 256, 4096
