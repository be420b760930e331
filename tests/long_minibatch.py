"""A process that reads groups of long responses as the trainer does: prints its memory as JSON.

python -m long_minibatch JSON-OF-THE-SPEC GROUP-FILE...
"""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from pathlib import Path

import torch
from long_rollouts import EXPERTS, LAYERS, TOP_K

from keel.queue import SlotKey, parse_envelope
from keel.spec import RunSpec, parse_spec
from keel_trainer.sequences import RouteShape
from keel_trainer.steps import Group, MiniBatch, decode_group


def memory(field: str) -> int:
    """Bytes of this process: VmHWM is the most it had, VmRSS what it has."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def read(path: Path, slot: int, spec: RunSpec) -> Group:
    """One group, from its blob."""
    envelope = parse_envelope(path.read_bytes(), SlotKey(0, 0, slot), run="r")
    return decode_group(envelope, spec, vocab_size=64, routes=RouteShape(LAYERS, TOP_K, EXPERTS))


def main() -> None:
    """Assembles the mini-batch."""
    spec = parse_spec(json.loads(sys.argv[1]))
    before = memory("VmRSS")
    groups = [read(Path(path), slot, spec) for slot, path in enumerate(sys.argv[2:])]
    decoded = memory("VmHWM")
    minibatch = MiniBatch.assemble(groups, spec, trainer_version=0, device="cpu")
    del groups
    tensors = [
        value
        for micro in minibatch.micros
        for name in fields(micro)
        if isinstance(value := getattr(micro, name.name), torch.Tensor)
    ]
    told = {
        "decoded": decoded - before,
        "peak": memory("VmHWM") - before,
        "left": memory("VmRSS") - before,
        "tensors": sum(tensor.nbytes for tensor in tensors),
        "valid_tokens": sum(micro.tokens for micro in minibatch.micros),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
