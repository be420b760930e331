"""Numbers of few bits: tensors round-tripped through e4m3 and e2m1 with block scales.

    fp8    e4m3; one scale for 128 x 128 of a weight matrix, for 1 x 128 of an input
    fp4    NVFP4: e2m1; one e4m3 scale for 16 numbers along the input dimension, and one float32
           scale for the whole matrix, or for a token's whole input

NVFP4 and not MXFP4 (32 numbers, a scale that is a power of two): it is the finer of the two formats
of today's 4-bit hardware, and the one that runs both weights and inputs in 4 bits. Engines give a
batch's inputs one calibrated float32 scale; a token has one of its own here, so that no row's
numbers depend on the rows beside it.

Rounding is to nearest, ties to even, as in hardware. All results are exact in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

E4M3_MAX = 448.0
E2M1_MAX = 6.0
FP8_BLOCK = 128
FP4_BLOCK = 16
_TINY = torch.finfo(torch.float32).tiny
_EXPONENT_BITS = 0x7F800000


@dataclass(frozen=True)
class Format:
    """A number format with its scales. Both functions keep shape and dtype."""

    rows: Callable[[torch.Tensor], torch.Tensor]
    """Rounds inputs [..., width]: every row by itself."""
    matrices: Callable[[torch.Tensor], torch.Tensor]
    """Rounds weights [..., rows, columns], columns being the input dimension."""


def round_to_bits(x: torch.Tensor, *, bits: int, smallest_normal: float) -> torch.Tensor:
    """Rounds float32 to numbers of `bits` stored mantissa bits; there is no largest one.

    Adding and taking away 1.5 * 2^(23 - bits) * 2^e rounds a number of exponent e to a multiple of
    2^(e - bits), its unit in the last place. Five vectorised passes; torch's cast back from fp8 is
    a scalar loop on a CPU, 4 times slower.
    """
    exponent = x.abs().clamp_(min=smallest_normal).view(torch.int32)
    magic = exponent.bitwise_and_(_EXPONENT_BITS).view(torch.float32).mul_(1.5 * 2.0 ** (23 - bits))
    return torch.add(x, magic).sub_(magic)


def round_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Equals `x.to(torch.float8_e4m3fn).float()` bit for bit for float32 |x| <= 448."""
    return round_to_bits(x, bits=3, smallest_normal=2.0**-6)


def round_e2m1(x: torch.Tensor) -> torch.Tensor:
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, for any float32 but NaN."""
    return round_to_bits(x.clamp(-E2M1_MAX, E2M1_MAX), bits=1, smallest_normal=1.0)


def _fp8_rows(x: torch.Tensor) -> torch.Tensor:
    width = x.shape[-1]
    blocks = _blocks(x, min(FP8_BLOCK, width))
    scale = blocks.abs().amax(-1, keepdim=True).div_(E4M3_MAX).clamp_(min=_TINY)
    return _whole(round_e4m3(blocks / scale).mul_(scale), x)


def _fp8_matrices(w: torch.Tensor) -> torch.Tensor:
    rows, columns = w.shape[-2:]
    padded = functional.pad(w.float(), (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK))
    blocks = padded.unflatten(-1, (-1, FP8_BLOCK)).unflatten(-3, (-1, FP8_BLOCK))
    scale = blocks.abs().amax((-3, -1), keepdim=True).div_(E4M3_MAX).clamp_(min=_TINY)
    rounded = (round_e4m3(blocks / scale) * scale).flatten(-2).flatten(-3, -2)
    return rounded[..., :rows, :columns].to(w.dtype)


def _fp4_rows(x: torch.Tensor) -> torch.Tensor:
    return _fp4(x, over=(-2, -1))


def _fp4_matrices(w: torch.Tensor) -> torch.Tensor:
    return _fp4(w, over=(-3, -2, -1))


def _fp4(x: torch.Tensor, over: tuple[int, ...]) -> torch.Tensor:
    """Blocks along the last dimension; `over`: the block dimensions that share a float32 scale.

    That scale takes the largest block scale to 448, the largest e4m3.
    """
    blocks = _blocks(x, FP4_BLOCK)
    largest = blocks.abs().amax(-1, keepdim=True)
    shared = largest.amax(over, keepdim=True).div_(E2M1_MAX * E4M3_MAX).clamp_(min=_TINY)
    scale = round_e4m3(largest.div_(E2M1_MAX).div_(shared)).mul_(shared)
    # a block that is small beside the others may have scale 0: it becomes 0
    return _whole(round_e2m1(blocks / scale.clamp(min=_TINY)).mul_(scale), x)


def _blocks(x: torch.Tensor, size: int) -> torch.Tensor:
    """Float32 [..., blocks, size], the last one padded with zeros."""
    return functional.pad(x.float(), (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))


def _whole(blocks: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return blocks.flatten(-2)[..., : like.shape[-1]].to(like.dtype)


FP8 = Format(_fp8_rows, _fp8_matrices)
FP4 = Format(_fp4_rows, _fp4_matrices)
