"""Seeds. Everything random in a run is a function of its spec and a place in its data."""

from __future__ import annotations

import xxhash


def derive_seed(seed: int, *path: int | str) -> int:
    """A 64-bit seed for one place, e.g. derive_seed(spec.seed, attempt, "group", lap, slot).

    Places that differ in any component get independent seeds; equal ones the same.
    """
    text = "/".join(f"{type(part).__name__}:{part}" for part in (seed, *path))
    return xxhash.xxh3_64_intdigest(text.encode())
