"""What emulated precisions of the torch engine cost, and what they do to log-probs and routes.

`make bench-quantize`. Cold-starts the preset as the demo does (some 30 s), then prints
for each precision: tokens/s of CPU time (medians of
interleaved rounds, one thread, 256 rows x 24 tokens), and
on tokens that this precision sampled, against the float32 weights of a trainer: k3 and mean and
median |d log p| in nats, the share of (token, layer) pairs that took other experts, and of tokens
with any.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.spec import parse_spec
from keel.types.v1 import tensor_pb2
from keel_rollout.collector.tasks.multiplication import Multiplication
from keel_rollout.engines.base import GroupRequest, Piece
from keel_rollout.engines.torch.batch import Batch, Job
from keel_rollout.engines.torch.model import Model
from keel_trainer.artifact import prepare_artifact
from keel_trainer.backends.torch import TorchBackend
from keel_trainer.batch import collate
from keel_trainer.sequences import TrainSequence
from keel_trainer.steps import imitate

SPEC = parse_spec({"name": "b", "model": {"path": "preset:tiny-qwen3-moe"}, "recipe": {"steps": 1}})
ROUNDS, GROUPS, GROUP_SIZE, TOKENS = 9, 32, 8, 24
PRECISIONS = {
    "float32": pb.EnginePrecision(),
    "fp8 weights": pb.EnginePrecision(quantize=pb.QUANTIZATION_FP8),
    "fp8": pb.EnginePrecision(quantize=pb.QUANTIZATION_FP8, quantize_inputs=True),
    "fp4 weights": pb.EnginePrecision(quantize=pb.QUANTIZATION_FP4),
    "fp4": pb.EnginePrecision(quantize=pb.QUANTIZATION_FP4, quantize_inputs=True),
    "fp4 and router": pb.EnginePrecision(
        quantize=pb.QUANTIZATION_FP4, quantize_inputs=True, quantize_router=True
    ),
}


def sequence(ids: list[int], prompt: int, logprobs: np.ndarray | None = None) -> TrainSequence:
    """For scoring and imitation: no routes, no reward."""
    response = len(ids) - prompt
    return TrainSequence(
        token_ids_T=np.array(ids, np.int32),
        prompt_length=prompt,
        rollout_logprobs_R=np.zeros(response, np.float32) if logprobs is None else logprobs,
        routes_TLK=None,
        policy_versions_R=np.zeros(response, np.int64),
        reward=0.0,
        reward_parts={},
        truncated=False,
        valid=True,
        invalid_reason="",
        slot=0,
        sample=0,
    )


def cold_started(folder: Path) -> tuple[TorchBackend, list[list[int]]]:
    """A model that answers now and then, and prompts for it."""
    path, task = prepare_artifact(SPEC, folder), Multiplication(3)
    tokenizer = AutoTokenizer.from_pretrained(path)
    backend = TorchBackend.from_pretrained(path)
    for step in range(380):
        pairs = [task.demonstration(step * 64 + i) for i in range(64)]
        batch = [
            sequence(tokenizer.encode(p) + tokenizer.encode(r), len(tokenizer.encode(p)))
            for p, r in pairs
        ]
        loss = imitate(backend, batch, rate=2e-3, budget_tokens=16384, device="cpu")
    print(f"cold start: loss {loss:.3f} nats a token")
    return backend, [tokenizer.encode(task.training_problem(i).prompt) for i in range(GROUPS)]


def generate(model: Model, prompts: list[list[int]]) -> dict[tuple[int, int], list[Piece]]:
    """Every response whole, by (prompt, sample)."""
    batch, found = Batch(model, version=0), {}
    requests = [
        GroupRequest(
            slot=slot,
            prompt_P=np.array(prompt, np.int32),
            num_samples=GROUP_SIZE,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            max_tokens=TOKENS,
            stop_token_ids=(),
            seed=slot,
            with_routes=True,
        )
        for slot, prompt in enumerate(prompts)
    ]
    batch.add([Job(request, sink=None) for request in requests])
    while len(batch):
        for job, event in batch.step():
            if isinstance(event, Piece):
                found.setdefault((job.request.slot, event.sample), []).append(event)
    return found


def against(
    backend: TorchBackend, prompts: list[list[int]], found: dict[tuple[int, int], list[Piece]]
) -> str:
    """The columns that tell how far a precision is from the trainer."""
    gaps, pairs, tokens = [], [], []
    for (slot, _), pieces in found.items():
        (piece,) = pieces
        prompt = prompts[slot]
        ids = [*prompt, *piece.token_ids_T.tolist()]
        scored = backend.score(collate([sequence(ids, len(prompt))]), temperature=1.0)
        ours = scored.logprobs_NT[0, len(prompt) - 1 :].numpy().astype(np.float64)
        gaps.append(ours - piece.rollout_logprobs_T)
        assert scored.natural_NTLK is not None
        assert piece.routes_RLK is not None
        differ = (np.sort(scored.natural_NTLK[0].numpy(), -1) != np.sort(piece.routes_RLK, -1)).any(
            -1
        )
        pairs.append(differ.ravel())
        tokens.append(differ.any(-1))
    d, pair, token = np.concatenate(gaps), np.concatenate(pairs), np.concatenate(tokens)
    k3 = (np.expm1(d) - d).mean()
    return (
        f"{k3:9.2e} {np.abs(d).mean():8.4f} {np.median(np.abs(d)):8.4f} "
        f"{pair.mean():7.1%} {token.mean():7.1%}"
    )


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        backend, prompts = cold_started(Path(folder))
        backend.save_pretrained(Path(folder) / "taught")
        config = {"config.json": (Path(folder) / "taught" / "config.json").read_bytes()}
    weights = {name: tensor.clone() for name, tensor in backend.model.state_dict().items()}
    models = {}
    for name, precision in PRECISIONS.items():
        precision.dtype = tensor_pb2.D_TYPE_FLOAT32
        models[name] = Model(config, precision, torch.device("cpu"))
        models[name].apply(weights)
    rates: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for turn in range(ROUNDS + 1):
            for name, model in models.items():
                began = time.thread_time()
                found = generate(model, prompts)
                if turn:  # the first warms up
                    rates[name].append(GROUPS * GROUP_SIZE * TOKENS / (time.thread_time() - began))
    float32 = statistics.median(rates["float32"])
    print("precision       tokens/s  ratio        k3     mean   median   pairs  tokens")
    for name, model in models.items():
        with torch.inference_mode():
            found = generate(model, prompts)
        rate = statistics.median(rates[name])
        print(f"{name:15} {rate:8.0f} {rate / float32:6.2f} {against(backend, prompts, found)}")


if __name__ == "__main__":
    main()
