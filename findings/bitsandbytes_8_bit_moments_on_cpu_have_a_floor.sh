#!/usr/bin/env bash
# bitsandbytes 0.50.2, on a CPU: quantize_blockwise looks a number's code up in a table of 65,536 even steps from -1
# to 1 and not in its dynamic map. AdamW8bit keeps its second moments by it, and what is below 1.5e-5 of the largest
# in its block of 256 comes back as 1.56e-5 of it, 0 as well, although the map has seven finer codes. A weight whose
# gradient is a thousandth of the largest in its block is so stepped by about a quarter of what AdamW steps it, and
# the size of a gradient, which Adam cancels, is not cancelled there. Nothing tells it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --quiet --disable-pip-version-check install torch==2.13.0
"$folder/venv/bin/pip" --quiet --disable-pip-version-check install bitsandbytes==0.50.2
export CUDA_VISIBLE_DEVICES=
cat > "$folder/floor.py" <<'PYTHON'
import bitsandbytes as bnb
import torch
from bitsandbytes.functional import create_dynamic_map, dequantize_blockwise, quantize_blockwise

codes = create_dynamic_map(signed=False)


def kept(share):
    """What a number comes back as that is `share` of the largest in its block, and the nearest in the map."""
    block = torch.full((256,), share)
    block[0] = 1.0
    found = dequantize_blockwise(*quantize_blockwise(block, code=codes.clone(), blocksize=256))
    return float(found[1]), float(codes[(codes - share).abs().argmin()])


def moved(optimizer):
    """How far 30 steps take weights whose gradients, constant, are a thousandth of that of the first of a block."""
    weight = torch.nn.Parameter(torch.zeros(4096))
    stepped = optimizer([weight], lr=1e-3, weight_decay=0.0)
    for _ in range(30):
        weight.grad = torch.full((4096,), 1e-3)
        weight.grad[::256] = 1.0
        stepped.step()
    return float(weight[1])


shares = (0.0, 1e-7, 1e-6, 5e-6, 1e-3)
found = {share: kept(share) for share in shares}
ratio = moved(bnb.optim.AdamW8bit) / moved(torch.optim.AdamW)
told = "; ".join(f"{share:g}: {back:.3g} ({near:.3g})" for share, (back, near) in found.items())
print(f"share of the largest: kept (nearest in the map): {told}; step to AdamW's: {ratio:.2f}")
assert len({found[share][0] for share in shares[:4]}) == 1, "the behaviour changed: small moments differ"
assert found[1e-7][0] > 1.5e-5 and found[1e-7][1] < 1e-6
assert abs(found[1e-3][0] / found[1e-3][1] - 1) < 1e-6
assert ratio < 0.5, f"the behaviour changed: {ratio}"
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/floor.py" > "$folder/seen" 2> "$folder/log" || {
    cat "$folder/log" "$folder/seen"
    exit 1
}
tail -1 "$folder/seen"
# seen: share of the largest: kept (nearest in the map): 0: 1.56e-05 (0); 1e-07: 1.56e-05 (0); 1e-06: 1.56e-05 (7.75e-07); 5e-06: 1.56e-05 (4.37e-06); 0.001: 0.000972 (0.000972); step to AdamW's: 0.28
