"""What the contract costs: tokens/s behind gRPC against in process, with routes against without.

`make bench-engines`. Each engine is started once (`engine_host.py`) and used both ways: over gRPC
by the collector's own client, in another process, every message decoded and every checksum
verified; and in process: torch by `Engine.generate`, vLLM by its own AsyncLLM. (vLLM collects
routes whether they are asked for or not.) Rounds are interleaved; a ratio is the median of those of
its rounds. `cpu` is the same ratio in tokens per second of CPU that the engine's processes used,
which a busy machine disturbs less. Prints a table and writes benchmarks/results/engines.json.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from engine_host import Work

from keel import codec, rpc
from keel.presets import PRESETS
from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.rollout.v1 import rollout_service_pb2_grpc as pb_grpc
from keel.spec import COHORT_SEQUENCES, parse_spec
from keel.types.v1 import sequence_pb2, tensor_pb2
from keel_gateway.engine_kinds import python_of
from keel_gateway.supervisor import StackError
from keel_rollout.collector.engine_client import EngineClient, EngineModel
from keel_trainer.artifact import prepare_artifact
from keel_trainer.backends.torch import TorchBackend
from keel_trainer.version import Version

PRESET = "tiny-qwen3-moe"
ROUNDS = 9
WORK = Work(
    round=0,
    groups=64,
    samples=8,
    tokens=64,
    prompt=12,
    vocab=PRESETS[PRESET].config["vocab_size"],
    with_routes=True,
    cohort_groups=0,
)
AIMS = {"grpc": 0.95, "routes": 0.97}
RESULTS = Path(__file__).parent / "results" / "engines.json"
RUN = "bench"


class Bench:
    """One engine and both ways to it."""

    def __init__(self, kind: str) -> None:
        command = [python_of(kind), str(Path(__file__).with_name("engine_host.py"))]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [*command, "--kind", kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        self.address = f"127.0.0.1:{self._answer()['port']}"

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the engine ended with {self._process.wait()}")
        return json.loads(line)

    def in_process(self, work: Work) -> dict[str, Any]:
        """Seconds, and tokens by group and sample."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(work)) + "\n")
        self._process.stdin.flush()
        return self._answer()

    async def over_grpc(self, client: EngineClient, model: EngineModel, work: Work) -> Any:
        """The same, as the collector would have it."""

        async def one(slot: int) -> list[list[int]]:
            request = pb.GenerateRequest(
                id=sequence_pb2.SlotId(run=RUN, slot=slot),
                prompt_token_ids=codec.to_tensor(work.prompt_of(slot)),
                num_samples=work.samples,
                sampling=sequence_pb2.SamplingParams(temperature=1.0, max_tokens=work.tokens),
                seed=slot,
                purpose=pb.PURPOSE_TRAINING,
                with_routes=work.with_routes,
            )
            if cohort := work.cohort_of(f"grpc/{work.with_routes}", slot):
                request.cohort.id, request.cohort.size = cohort
            responses = await client.generate(request, model)
            assert not any(response.fault for response in responses), responses[0].fault
            return [response.token_ids_R.tolist() for response in responses]

        began_s = time.perf_counter()
        groups = await asyncio.gather(*(one(slot) for slot in range(work.groups)))
        return {"seconds": time.perf_counter() - began_s, "tokens": groups}

    def cpu_s(self) -> float:
        """Seconds of CPU that the engine has used, its children's included (Linux)."""
        family = {str(self._process.pid)}
        found = [
            (file.parent.name, file.read_text().rpartition(") ")[2].split())
            for file in Path("/proc").glob("[0-9]*/stat")
        ]
        for _ in range(3):  # generations
            family |= {pid for pid, fields in found if fields[1] in family}
        ticks = sum(int(f[11]) + int(f[12]) for pid, f in found if pid in family)
        return ticks / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """Ends the engine."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


def publish(address: str, folder: Path) -> None:
    """Loads the preset with random weights, as version 0."""
    spec = parse_spec({"name": RUN, "model": {"path": f"preset:{PRESET}"}, "recipe": {"steps": 1}})
    path = prepare_artifact(spec, folder)
    version = Version.build(0, TorchBackend.from_pretrained(path).weights(), [])
    lease = pb.Lease(run=RUN, fencing_token=1)

    def pieces() -> Iterator[pb.UpdateWeightsRequest]:
        for name, data in version.tensors.items():  # each far below a message's size
            chunk = pb.TensorChunk(name=name, data=bytes(data))
            yield pb.UpdateWeightsRequest(lease=lease, policy_version=0, chunk=chunk)

    with rpc.channel(address) as channel:
        stub = pb_grpc.RolloutServiceStub(channel)
        config = pb.ModelFile(name="config.json", data=(path / "config.json").read_bytes())
        precision = pb.EnginePrecision(dtype=tensor_pb2.D_TYPE_FLOAT32)
        stub.LoadModel(pb.LoadModelRequest(lease=lease, files=[config], precision=precision))
        stub.BeginWeightUpdate(
            pb.BeginWeightUpdateRequest(lease=lease, manifest=version.manifest), timeout=60
        )
        stub.UpdateWeights(pieces(), timeout=60)
        mark = version.manifest.fingerprint
        stub.FinishWeightUpdate(
            pb.FinishWeightUpdateRequest(lease=lease, policy_version=0, fingerprint=mark)
        )


async def measure(bench: Bench) -> dict[str, list[tuple[float, float]]]:
    """Seconds and CPU seconds of every round, by way and with or without routes."""
    client = EngineClient(bench.address)
    model = await client.model(RUN)
    cohort = COHORT_SEQUENCES // WORK.samples if model.can.deterministic else 0  # as in a job
    work = replace(WORK, cohort_groups=cohort)
    taken: dict[str, list[tuple[float, float]]] = {}
    for number in range(ROUNDS + 1):
        for routes in (True, False):
            for way in ("grpc", "in process") if number % 2 else ("in process", "grpc"):
                asked = replace(work, round=number, with_routes=routes)
                began_s = bench.cpu_s()
                if way == "grpc":
                    found = await bench.over_grpc(client, model, asked)
                else:
                    found = await asyncio.to_thread(bench.in_process, asked)
                check(found["tokens"], asked)
                if number:  # the first warms up
                    name = f"{way}, {'routes' if routes else 'no routes'}"
                    used = (found["seconds"], bench.cpu_s() - began_s)
                    taken.setdefault(name, []).append(used)
    await client.close()
    return taken


def check(tokens: list[list[list[int]]], work: Work) -> None:
    """Every sample has its tokens, of the vocabulary."""
    assert len(tokens) == work.groups
    for group in tokens:
        assert [len(sample) for sample in group] == [work.tokens] * work.samples
        assert all(0 <= token < work.vocab for sample in group for token in sample)


def rows(kind: str, taken: dict[str, list[tuple[float, float]]]) -> Iterator[dict[str, Any]]:
    """One row for each comparison: medians of both sides, and of the ratio in each round."""
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    tokens = WORK.groups * WORK.samples * WORK.tokens
    for name, ours, peer in (
        ("grpc", "grpc, routes", "in process, routes"),
        ("grpc, no routes", "grpc, no routes", "in process, no routes"),
        ("routes", "grpc, routes", "grpc, no routes"),
    ):
        # of seconds, so the other way round
        pairs = [
            [b / a for a, b in zip(*two, strict=True)]
            for two in zip(taken[ours], taken[peer], strict=True)
        ]
        wall, cpu = ([pair[which] for pair in pairs] for which in (0, 1))
        yield {
            "id": f"{kind}/{name}",
            "ours": round(tokens / statistics.median(wall_s for wall_s, _ in taken[ours])),
            "peer": round(tokens / statistics.median(wall_s for wall_s, _ in taken[peer])),
            "ratio": round(statistics.median(wall), 3),
            "lowest": round(min(wall), 3),
            "highest": round(max(wall), 3),
            "cpu_ratio": round(statistics.median(cpu), 3),
            "aim": AIMS[name.split(",")[0]],
            "unit": "tokens/s",
            "compares": f"{ours} / {peer}",
            "machine": machine,
            "load": round(os.getloadavg()[0], 1),
        }


def main() -> None:
    """Measures every engine that can be started here; says which cannot."""
    print(
        f"{WORK.groups} groups of {WORK.samples} x {WORK.tokens} tokens, {ROUNDS} rounds, {PRESET}"
    )
    print(f"{'':24} {'ours':>8} {'peer':>8}  ratio   aim    cpu   lowest, highest", flush=True)
    found: list[dict[str, Any]] = []
    for kind in sys.argv[1:] or ["torch", "vllm"]:
        try:
            bench = Bench(kind)
        except StackError as error:
            print(f"{kind}: not measured: {error}")
            continue
        try:
            with tempfile.TemporaryDirectory() as folder:
                publish(bench.address, Path(folder))
            measured = list(rows(kind, asyncio.run(measure(bench))))
        finally:
            bench.close()
        for row in measured:
            print(
                f"{row['id']:24} {row['ours']:8,} {row['peer']:8,} {row['ratio']:6.3f} "
                f"{row['aim']:5} {row['cpu_ratio']:6.3f}   {row['lowest']:.2f}, "
                f"{row['highest']:.2f}",
                flush=True,
            )
        found += measured
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps({"work": asdict(WORK), "rows": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
