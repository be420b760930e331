"""A torch engine that serves other weights than it was sent.

    python lying_engine.py --lies-from V

From version V on it multiplies the output layer by 3 after hashes were verified, as a broken loader
would: it says that it serves V, and only its log-probs tell.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from keel_rollout import engine_main
from keel_rollout.engines import torch as torch_engines
from keel_rollout.engines.base import StagedTensor


def main() -> None:
    """As `keel-engine`, with one more option."""
    at = sys.argv.index("--lies-from")
    lies_from = int(sys.argv[at + 1])
    del sys.argv[at : at + 2]
    create = torch_engines.create

    def lying(device: str, threads: int):
        engine = create(device, threads)
        apply = engine.apply

        async def wrong(version: int, tensors: Mapping[str, StagedTensor]) -> None:
            tensors = dict(tensors)
            if version >= lies_from:
                head = tensors["lm_head.weight"]
                data = (np.frombuffer(head.data, np.float32) * 3).view(np.uint8).data
                tensors["lm_head.weight"] = replace(head, data=data)
            await apply(version, tensors)

        engine.apply = wrong
        return engine

    torch_engines.create = lying
    engine_main.main()


if __name__ == "__main__":
    main()
