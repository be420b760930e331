"""The emulated formats: e4m3 against torch's own type, e2m1 against the table of its values."""

from __future__ import annotations

import json

import pytest
import torch
from enginekit import CONFIG, DENSE_CONFIG, FP8

from keel_rollout.engines.torch import rounding
from keel_rollout.engines.torch.model import Model
from keel_rollout.engines.torch.quantize import quantized_weights, round_weight
from keel_rollout.engines.torch.rounding import FP4, Format

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
"""Its magnitudes in code order: an even place is an even mantissa."""


def around_every_tie() -> torch.Tensor:
    """Every finite float32 whose low 12 bits are 0, and its neighbours; both signs."""
    high = torch.arange(0, 2**20, dtype=torch.int64) << 12
    bits = torch.cat([high, high + 1, high - 1]).clamp_(0, 0x7F7FFFFF).to(torch.int32)
    x = bits.view(torch.float32)
    return torch.cat([x, -x])


def test_round_e4m3_equals_the_cast_bit_for_bit() -> None:
    """2 x 3 x 2^20 values or so, of which |x| <= 448 are asked for."""
    x = around_every_tie()
    x = x[x.abs() <= 448]
    expected = x.to(torch.float8_e4m3fn).float()
    assert torch.equal(rounding.round_e4m3(x), expected)
    assert expected.unique().numel() == 2 * 127 - 1, "every finite e4m3 number, both zeros as one"


def test_round_e2m1_is_the_nearest_of_15_values_ties_to_even() -> None:
    """Against the exhaustive table, in float64; from 8 on that is 6, and distances would round."""
    x = around_every_tie()
    close = x.abs().clamp(max=8).double()
    distance = (close[:, None] - torch.tensor(E2M1, dtype=torch.float64)).abs()
    nearest = distance.amin(-1, keepdim=True)
    tied = distance == nearest
    # two are as near only at a tie: the one at an even place
    even = torch.tensor([place % 2 == 0 for place in range(8)])
    place = torch.where(tied.sum(-1, keepdim=True) > 1, tied & even, tied).long().argmax(-1)
    expected = torch.tensor(E2M1)[place] * x.sign()
    got = rounding.round_e2m1(x)
    assert torch.equal(got, expected)
    assert got.unique().numel() == 15
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert rounding.round_e2m1(ties).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    assert rounding.round_e2m1(torch.tensor([1e30, torch.inf])).tolist() == [6.0, 6.0]


def nvfp4(x: list[float], shared: float) -> list[float]:
    """One block by the book, with torch's own e4m3 for its scale."""
    block = torch.tensor(x)
    scale = (block.abs().max() / 6 / shared).to(torch.float8_e4m3fn).float() * shared
    if scale == 0:
        return [0.0] * len(x)
    return (rounding.round_e2m1(block / scale) * scale).tolist()


@pytest.mark.parametrize("width", [8, 16, 40, 128])
def test_fp4_rows_have_a_scale_of_e4m3_for_16_and_one_of_float32(width: int) -> None:
    """A row's largest |x| keeps its value to 1e-6; a row's numbers do not depend on its batch."""
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(0))
    x[1] *= 1000
    x[2, :16] *= 1e-6  # a block too small for the row's scales
    rounded = FP4.rows(x)
    for row in range(5):
        shared = float((x[row].abs().max() / (6 * 448)).float())
        for begin in range(0, width, 16):
            block = x[row, begin : begin + 16].tolist()
            assert rounded[row, begin : begin + 16].tolist() == nvfp4(block, shared)
        largest = x[row].abs().argmax()
        assert rounded[row, largest].item() == pytest.approx(x[row, largest].item(), rel=1e-6)
        assert torch.equal(FP4.rows(x[row : row + 1])[0], rounded[row])
    if width > 16:
        assert not rounded[2, :16].any()
    assert torch.equal(FP4.rows(torch.zeros(2, width)), torch.zeros(2, width))


def test_fp4_matrices_have_blocks_along_the_input_dimension() -> None:
    """[2, 5, 40]: three blocks a row, the last of 8; one float32 scale a matrix."""
    w = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(0))
    w[0] *= 50
    rounded = FP4.matrices(w)
    for matrix in range(2):
        shared = float(w[matrix].abs().max() / (6 * 448))
        for row in range(5):
            for begin in (0, 16, 32):
                block = w[matrix, row, begin : begin + 16].tolist()
                assert rounded[matrix, row, begin : begin + 16].tolist() == nvfp4(block, shared)


@pytest.mark.parametrize("form", [rounding.FP8, FP4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_keeps_shape_and_dtype_and_leaves_its_input_alone(
    form: Format, dtype: torch.dtype
) -> None:
    for function in (form.rows, form.matrices):
        x = torch.randn(3, 7, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
        before = x.clone()
        rounded = function(x)
        assert (rounded.shape, rounded.dtype) == (x.shape, dtype)
        assert torch.equal(x, before)
        assert not torch.equal(rounded, x)


@pytest.mark.parametrize("width", [64, 128, 200, 256])
def test_rows_are_scaled_in_blocks_of_128(width: int) -> None:
    """Each block's largest |x| survives (it maps to 448); others move by at most 1/16 of it."""
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(0))
    x[:, : min(width, 128)] *= 1000
    rounded = rounding.FP8.rows(x)
    for begin in range(0, width, 128):
        block, got = x[:, begin : begin + 128], rounded[:, begin : begin + 128]
        scale = block.abs().amax(-1, keepdim=True) / 448
        expected = (block / scale).to(torch.float8_e4m3fn).float() * scale
        assert torch.equal(got, expected)
    assert not torch.equal(rounded, x)
    assert torch.equal(rounding.FP8.rows(torch.zeros(2, width)), torch.zeros(2, width))


def test_matrices_are_scaled_in_blocks_of_128_by_128() -> None:
    """[2, 130, 200]: four blocks a matrix, the edge ones smaller."""
    w = torch.randn(2, 130, 200, generator=torch.Generator().manual_seed(0))
    w[:, :128, :128] *= 50
    rounded = rounding.FP8.matrices(w)
    assert rounded.shape == w.shape
    for matrix in range(2):
        for rows in (slice(0, 128), slice(128, 130)):
            for columns in (slice(0, 128), slice(128, 200)):
                block = w[matrix, rows, columns]
                scale = block.abs().max() / 448
                expected = (block / scale).to(torch.float8_e4m3fn).float() * scale
                assert torch.equal(rounded[matrix, rows, columns], expected)


@pytest.mark.parametrize("form", [rounding.FP8, FP4])
def test_gate_and_up_have_scales_of_their_own(form: Format) -> None:
    """Fused [E, 2I, H] with I = 64: a large up must not coarsen a small gate."""
    fused = torch.randn(3, 128, 128, generator=torch.Generator().manual_seed(0))
    fused[:, 64:] *= 1e6
    gate = round_weight(form, "x.experts.gate_up_proj", fused)[:, :64]
    assert torch.equal(gate, form.matrices(fused[:, :64]))


@pytest.mark.parametrize("routers", [False, True])
def test_only_linears_experts_and_on_request_routers_are_rounded(routers: bool) -> None:
    """Of each of 2 layers: 4 projections, 2 expert stacks, perhaps 1 router. Never the rest."""
    precision = type(FP8)()
    precision.CopyFrom(FP8)
    precision.quantize_router = routers
    files = {"config.json": json.dumps(CONFIG).encode()}
    model = Model(files, precision, torch.device("cpu"))
    names = set(quantized_weights(model.net, model.tap, routers=routers))
    assert len(names) == 2 * (7 if routers else 6)
    assert all("layers." in name and "norm" not in name for name in names)
    assert any(name.endswith("mlp.gate.weight") for name in names) == routers


def test_a_dense_model_has_seven_rounded_linears_a_layer() -> None:
    """q, k, v, o, gate, up, down; the tied output layer is left alone."""
    model = Model({"config.json": json.dumps(DENSE_CONFIG).encode()}, FP8, torch.device("cpu"))
    names = list(quantized_weights(model.net, model.tap, routers=False))
    assert len(names) == len(set(names)) == 14
