"""The fp8 emulation against torch's own e4m3 type."""

from __future__ import annotations

import json

import pytest
import torch
from enginekit import CONFIG, DENSE_CONFIG, FP8

from keel_rollout.engines.torch import fp8
from keel_rollout.engines.torch.model import Model


def test_round_e4m3_equals_the_cast_bit_for_bit() -> None:
    """Every float32 whose low 12 bits are 0 or around a tie, |x| <= 448: 2 x 2^20 values or so."""
    high = torch.arange(0, 2**20, dtype=torch.int64) << 12
    bits = torch.cat([high, high + 1, high - 1]).clamp_(0, 0x7F7FFFFF).to(torch.int32)
    x = bits.view(torch.float32)
    x = torch.cat([x, -x])
    x = x[x.abs() <= 448]
    expected = x.to(torch.float8_e4m3fn).float()
    assert torch.equal(fp8.round_e4m3(x), expected)
    assert expected.unique().numel() == 2 * 127 - 1, "every finite e4m3 number, both zeros as one"


@pytest.mark.parametrize("width", [64, 128, 200, 256])
def test_rows_are_scaled_in_blocks_of_128(width: int) -> None:
    """Each block's largest |x| survives (it maps to 448); others move by at most 1/16 of it."""
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(0))
    x[:, : min(width, 128)] *= 1000
    rounded = fp8.round_rows(x)
    for begin in range(0, width, 128):
        block, got = x[:, begin : begin + 128], rounded[:, begin : begin + 128]
        scale = block.abs().amax(-1, keepdim=True) / 448
        expected = (block / scale).to(torch.float8_e4m3fn).float() * scale
        assert torch.equal(got, expected)
    assert not torch.equal(rounded, x)
    assert torch.equal(fp8.round_rows(torch.zeros(2, width)), torch.zeros(2, width))


def test_matrices_are_scaled_in_blocks_of_128_by_128() -> None:
    """[2, 130, 200]: four blocks a matrix, the edge ones smaller."""
    w = torch.randn(2, 130, 200, generator=torch.Generator().manual_seed(0))
    w[:, :128, :128] *= 50
    rounded = fp8.round_matrices(w)
    assert rounded.shape == w.shape
    for matrix in range(2):
        for rows in (slice(0, 128), slice(128, 130)):
            for columns in (slice(0, 128), slice(128, 200)):
                block = w[matrix, rows, columns]
                scale = block.abs().max() / 448
                expected = (block / scale).to(torch.float8_e4m3fn).float() * scale
                assert torch.equal(rounded[matrix, rows, columns], expected)


def test_gate_and_up_have_blocks_of_their_own() -> None:
    """Fused [E, 2I, H] with I = 64: a large up must not coarsen a small gate."""
    fused = torch.randn(3, 128, 128, generator=torch.Generator().manual_seed(0))
    fused[:, 64:] *= 1e6
    gate = fp8.round_weight("x.experts.gate_up_proj", fused)[:, :64]
    assert torch.equal(gate, fp8.round_matrices(fused[:, :64]))


@pytest.mark.parametrize("routers", [False, True])
def test_only_linears_experts_and_on_request_routers_are_rounded(routers: bool) -> None:
    """Of each of 2 layers: 4 projections, 2 expert stacks, perhaps 1 router. Never the rest."""
    precision = type(FP8)()
    precision.CopyFrom(FP8)
    precision.quantize_router = routers
    files = {"config.json": json.dumps(CONFIG).encode()}
    model = Model(files, precision, torch.device("cpu"))
    names = set(fp8.quantized_weights(model.net, model.tap, routers=routers))
    assert len(names) == 2 * (7 if routers else 6)
    assert all("layers." in name and "norm" not in name for name in names)
    assert any(name.endswith("mlp.gate.weight") for name in names) == routers


def test_a_dense_model_has_seven_rounded_linears_a_layer() -> None:
    """q, k, v, o, gate, up, down; the tied output layer is left alone."""
    model = Model({"config.json": json.dumps(DENSE_CONFIG).encode()}, FP8, torch.device("cpu"))
    names = list(fp8.quantized_weights(model.net, model.tap, routers=False))
    assert len(names) == len(set(names)) == 14
