"""Triton's kernels for decoding (interpreted, where there is no GPU) against bitsandbytes and torch in float64."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from torch import Tensor

from gemma_ft.kernels.attention import eager_attention
from tests.kernels.interpreter import mend_bf16

DTYPES = [torch.float32, torch.bfloat16]
OUT = 64


def drawn(*shape: int, seed: int = 0, times: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * times


def error(found: Tensor, truth: Tensor) -> float:
    return float((found.cpu().double() - truth).norm() / truth.norm())


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> str:
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if torch.cuda.is_available():
        return "cuda"
    mend_bf16(monkeypatch)
    return "cpu"


def quantized(
    inputs: int, dtype: torch.dtype, *, nested: bool, blocksize: int = 64, storage: torch.dtype = torch.uint8
) -> tuple[Tensor, QuantState]:  # fmt: skip
    """A weight [OUT, inputs], whose blocks are of very different sizes."""
    weight = drawn(OUT, inputs, seed=5) * torch.logspace(-2, 1, OUT)[:, None]
    return quantize_4bit(
        weight.to(dtype), blocksize=blocksize, compress_statistics=nested, quant_type="nf4", quant_storage=storage
    )


def multiplied(x: Tensor, packed: Tensor, state: QuantState, device: str) -> Tensor:
    from gemma_ft.kernels.triton.gemv_nf4 import fits, gemv_nf4

    state.to(device)
    x, packed = x.to(device), packed.to(device)
    assert fits(x, state)
    found = gemv_nf4(x, packed, state).cpu()
    state.to("cpu")
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("blocksize", [64, 256])
def test_the_weights_are_those_of_bitsandbytes(blocksize: int, nested: bool, dtype: torch.dtype, device: str) -> None:
    packed, state = quantized(768, dtype, nested=nested, blocksize=blocksize)
    weight = dequantize_4bit(packed, state)
    picked = torch.cat((torch.arange(8), torch.tensor([127, 128, 255, 256, 500, 511, 640, 767])))
    x = torch.eye(768, dtype=dtype)[picked]
    assert torch.equal(multiplied(x, packed, state, device), weight.T[picked])


@pytest.mark.parametrize("rows", [1, pytest.param(3, marks=pytest.mark.slow), 16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [True, False])
def test_a_product_is_as_near_to_the_truth_as_torch_s(
    nested: bool, dtype: torch.dtype, rows: int, device: str
) -> None:  # fmt: skip
    from gemma_ft.kernels.triton.gemv_nf4 import TILES

    inputs = 5 * TILES[dtype]  # a number of tiles that no program's two divide
    packed, state = quantized(inputs, dtype, nested=nested)
    x, weight = drawn(rows, inputs).to(dtype), dequantize_4bit(packed, state)
    truth = x.double() @ weight.double().T
    found = multiplied(x, packed, state, device)
    assert found.dtype == dtype
    limit = 1e-6 if dtype == torch.float32 else 1.05 * error(x @ weight.T, truth)
    assert error(found, truth) <= limit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [128, 640])  # in one part, and in several
def test_a_row_s_product_does_not_depend_on_other_rows(inputs: int, dtype: torch.dtype, device: str) -> None:
    packed, state = quantized(inputs, dtype, nested=True)
    x = drawn(16, inputs, times=3.0).to(dtype)
    together = multiplied(x, packed, state, device)
    for row in (0, 7, 15):
        assert torch.equal(multiplied(x[row : row + 1], packed, state, device)[0], together[row])
    assert torch.equal(multiplied(x[5:8], packed, state, device), together[5:8])


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_lies_around_a_row_does_not_count(dtype: torch.dtype, device: str) -> None:
    packed, state = quantized(640, dtype, nested=True)
    around = torch.full((4, 640), float("nan"), dtype=dtype)
    around[1] = drawn(640).to(dtype)
    assert torch.equal(
        multiplied(around[1:2], packed, state, device), multiplied(around[1:2].clone(), packed, state, device)
    )


def test_bytes_may_be_stored_as_another_dtype(device: str) -> None:
    x = drawn(2, 256).bfloat16()
    stored = [
        multiplied(x, *quantized(256, torch.bfloat16, nested=True, storage=storage), device)
        for storage in (torch.uint8, torch.bfloat16)
    ]
    assert torch.equal(*stored)


def test_the_parts_of_a_product_hold_every_tile_once() -> None:
    from gemma_ft.kernels.triton.gemv_nf4 import MOST_SPLITS, PROGRAMS, _splits

    for blocks in (1, 8, 32, 72, 288, 512, 1152):
        for tiles in (1, 2, 5, 16, 18, 72, 288):
            splits, each = _splits(blocks, tiles)
            assert (splits - 1) * each < tiles <= splits * each
            assert splits == 1 or blocks * splits <= PROGRAMS
            assert splits <= MOST_SPLITS


def test_what_the_product_does_not_take_is_said(device: str) -> None:
    from gemma_ft.kernels.triton.gemv_nf4 import fits

    _, state = quantized(256, torch.bfloat16, nested=True)
    x = drawn(16, 256).bfloat16()
    assert fits(x, state)
    assert not fits(drawn(17, 256).bfloat16(), state)
    assert not fits(x[:0], state)
    assert not fits(x.half(), state)
    assert not fits(x[:, :128], state)
    assert not fits(drawn(2, 192).bfloat16(), quantized(192, torch.bfloat16, nested=True)[1])
    assert not fits(x, quantize_4bit(drawn(48, 256).bfloat16(), blocksize=64, quant_type="nf4")[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(("blocksize", "storage"), [(64, torch.uint8), (128, torch.bfloat16)])
def test_a_whole_weight_is_that_of_bitsandbytes(
    blocksize: int, storage: torch.dtype, nested: bool, dtype: torch.dtype, device: str
) -> None:
    from gemma_ft.kernels.triton.nf4 import dequantize

    packed, state = quantized(384, dtype, nested=nested, blocksize=blocksize, storage=storage)
    whole = dequantize_4bit(packed, state)
    state.to(device)
    assert torch.equal(dequantize(packed.to(device), state).cpu(), whole)
    out = torch.full(state.shape, float("nan"), dtype=dtype, device=device)
    assert dequantize(packed.to(device), state, out) is out
    assert torch.equal(out.cpu(), whole)


@pytest.mark.parametrize("rank", [8, 5])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lora_is_added_as_the_layer_adds_it(dtype: torch.dtype, stored: torch.dtype, rank: int, device: str) -> None:
    from gemma_ft.kernels.triton.gemv_lora import add_lora

    if (dtype, stored) == (torch.float32, torch.bfloat16):
        pytest.skip("an adapter is not narrower than what it is added to")
    x, a, b = drawn(3, 1500).to(dtype), drawn(rank, 1500, seed=1).to(stored), drawn(100, rank, seed=2).to(stored)
    base = drawn(3, 100, seed=3).to(dtype)
    narrow = [one.to(dtype).double() for one in (a, b)]
    low = (1.7 * (x.double() @ narrow[0].T)).to(dtype).double()
    truth = base.double() + low @ narrow[1].T
    given, out = [one.to(device) for one in (x, a, b)], base.to(device)
    add_lora(*given, 1.7, out)
    assert error(out, truth) < (2e-6 if dtype == torch.float32 else 1.05 * error(truth.to(dtype), truth) + 1e-4)
    alone = base[1:2].to(device)
    add_lora(given[0][1:2], *given[1:], 1.7, alone)
    assert torch.equal(alone[0], out[1])


def attended(
    query: Tensor, keys: Tensor, values: Tensor, held: list[int], softcap: float | None, device: str
) -> Tensor:  # fmt: skip
    from gemma_ft.kernels.triton.decode_attention import decode_attention, serves_decode_attention

    given = [one.to(device) for one in (query, keys, values)]
    assert serves_decode_attention(*given)
    return decode_attention(*given, torch.tensor(held, device=device), query.shape[3] ** -0.5, softcap).cpu()


def expected(query: Tensor, keys: Tensor, values: Tensor, held: list[int], softcap: float | None) -> Tensor:
    visible = (torch.arange(keys.shape[2]) < torch.tensor(held)[:, None])[:, None, None]
    return eager_attention(query, keys, values, visible, scale=query.shape[3] ** -0.5, softcap=softcap)


HELD = [1, 20, 64, 100, 160]  # one place, a part of a span, a whole one, parts of several, all places
LARGE = 9.0  # makes scores so large that a cap of 50 bends them


def drawn_rings(
    dtype: torch.dtype, heads: tuple[int, int] = (4, 2), times: float = LARGE
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """A query, keys and values for each row of HELD."""
    query = drawn(len(HELD), heads[0], 1, 32, seed=1, times=times)
    keys, values = (drawn(len(HELD), heads[1], max(HELD), 32, seed=seed, times=seed) for seed in (3, 1))
    return query.to(dtype), keys.to(dtype), values.to(dtype)


@pytest.mark.parametrize(("softcap", "times"), [(None, 0.3), (50.0, 0.3), (50.0, LARGE)])
@pytest.mark.parametrize("heads", [(4, 2), (8, 1), pytest.param((1, 1), marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_is_as_near_to_the_truth_as_torch_s(
    dtype: torch.dtype,
    heads: tuple[int, int],
    softcap: float | None,
    times: float,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from gemma_ft.kernels.triton import decode_attention as kernel

    monkeypatch.setattr(kernel, "TOGETHER", 2)  # spans are joined in several steps
    given = drawn_rings(dtype, heads, times)
    truth = expected(*(one.double() for one in given), HELD, softcap)
    found = attended(*given, HELD, softcap, device)
    assert found.dtype == dtype
    assert found.shape == given[0].shape
    limit = 1e-6 if times < 1 else 4e-6  # half of float32's steps at the largest scores
    if dtype == torch.bfloat16:
        limit = 1.05 * error(expected(*given, HELD, softcap), truth)
    assert error(found, truth) <= limit


def test_the_cap_bends_what_is_tested() -> None:
    given = [one.double() for one in drawn_rings(torch.float32)]
    assert error(expected(*given, HELD, 50.0), expected(*given, HELD, None)) > 0.05


def test_the_cap_comes_before_the_mask(device: str) -> None:
    """Else what is hidden has a score of -50, which counts where no score is higher."""
    query, keys, values = drawn_rings(torch.float32)
    given = query.abs(), -keys.abs(), values
    assert error(attended(*given, HELD, 50.0, device), expected(*(one.double() for one in given), HELD, 50.0)) < 4e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_seen_does_not_count(dtype: torch.dtype, device: str) -> None:
    query, keys, values = drawn_rings(dtype)
    before = attended(query, keys, values, HELD, 50.0, device)
    for row, count in enumerate(HELD):
        keys[row, :, count:] = values[row, :, count:] = float("nan")
    assert torch.equal(attended(query, keys, values, HELD, 50.0, device), before)


def test_what_is_seen_and_no_number_is_not_hidden(device: str) -> None:
    query, keys, values = drawn_rings(torch.float32)
    keys[1, 0, 19, 3] = float("nan")
    found = attended(query, keys, values, HELD, 50.0, device)
    assert (~found.isfinite().all(dim=-1)).nonzero().tolist() == [[1, 0, 0], [1, 1, 0]]  # the heads of that key


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_s_attention_does_not_depend_on_others_nor_on_the_ring(dtype: torch.dtype, device: str) -> None:
    query, keys, values = drawn_rings(dtype)
    together = attended(query, keys, values, HELD, 50.0, device)
    longer = [torch.cat((one, torch.ones_like(one)), dim=2) for one in (keys, values)]
    assert torch.equal(attended(query, *longer, HELD, 50.0, device), together)
    for row, count in enumerate(HELD):
        alone = [one[row : row + 1] for one in (query, keys, values)]
        assert torch.equal(attended(*alone, [count], 50.0, device)[0], together[row])


def test_rings_may_be_views(device: str) -> None:
    query, keys, values = drawn_rings(torch.float32)
    plain = attended(query, keys, values, HELD, None, device)
    turned = [one.transpose(1, 2).contiguous().transpose(1, 2) for one in (keys, values)]
    rows, places = len(HELD), max(HELD)
    within, many = torch.zeros(rows + 2, 2, places + 10, 32), torch.zeros(rows, 4, 3, 32)
    within[1:-1, :, :places] = keys
    many[:, :, 1:2] = query
    assert torch.equal(attended(query, *turned, HELD, None, device), plain)
    assert torch.equal(attended(many[:, :, 1:2], within[1:-1, :, :places], turned[1], HELD, None, device), plain)


def test_what_attention_does_not_take_is_said(device: str) -> None:
    from gemma_ft.kernels.triton.decode_attention import serves_decode_attention

    query, keys, values = drawn_rings(torch.float32)
    assert serves_decode_attention(query, keys, values)
    assert not serves_decode_attention(query.expand(-1, -1, 2, -1), keys, values)
    assert not serves_decode_attention(query, keys, values.bfloat16())
    assert not serves_decode_attention(*(one[..., :24] for one in (query, keys, values)))
    assert not serves_decode_attention(*(one[..., ::2] for one in (query, keys, values)))
    assert not serves_decode_attention(torch.zeros(4, 34, 1, 32), keys, values)
