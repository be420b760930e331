"""What stands around the collector in its tests: a run record, an artifact, an engine to script."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import redis
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from keel import rpc
from keel.codec import fill, to_ndarray, xxh3
from keel.presets import END, PAD, PRESETS
from keel.queue import CONSUMER_GROUP, RUNS_KEY, demos_key, groups_key, run_key, unpack
from keel.record import RunRecord, pack_fields
from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.rollout.v1 import rollout_service_pb2_grpc as pb_grpc
from keel.spec import RunSpec, parse_spec
from keel.types.v1 import sequence_pb2

PRESET = PRESETS["tiny-qwen3-moe"]
LAYERS, EXPERTS, TOP_K = 2, 16, 2
Change = Callable[[pb.GenerateRequest, pb.GenerateResponse], None]


def make_tokenizer() -> Tokenizer:
    """The preset's: one token a character."""
    vocabulary = {token: index for index, token in enumerate([PAD, END, *PRESET.alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([PAD, END])
    return tokenizer


def make_artifact(folder: Path) -> Path:
    """As much of a base artifact as the collector reads."""
    folder.mkdir(exist_ok=True)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def make_spec(**sections: dict[str, object]) -> RunSpec:
    """Two laps of 2 x 4 groups of 4."""
    base: dict[str, dict[str, object]] = {
        "model": {"path": "preset:tiny-qwen3-moe"},
        "rollout": {"group_size": 4, "max_tokens": 24},
        "recipe": {"off_policiness": 2, "groups_per_minibatch": 4, "steps": 4},
    }
    merged = {name: base.get(name, {}) | sections.get(name, {}) for name in {*base, *sections}}
    return parse_spec({"name": "test", "seed": 7, **merged})


def write_run(
    client: redis.Redis,
    spec: RunSpec,
    artifact: Path,
    *engines: str,
    run: str = "r",
    **fields: object,
) -> None:
    """A run record and streams as gateway and trainer leave them; `fields` as in `pack_fields`.

    All engines have proved the version.
    """
    for key in (demos_key(run), groups_key(run)):
        client.xgroup_create(key, CONSUMER_GROUP, id="0", mkstream=True)
    record = RunRecord(run=run, spec=spec, created_s=time.time(), engines=engines)
    version = fields.get("policy_version")
    ready = {} if version is None else {"proved": dict.fromkeys(engines, version)}
    written = pack_fields(artifact=artifact, **({"phase": "TRAINING"} | ready | fields))
    client.hset(run_key(run), mapping=record.to_hash() | written)
    client.zadd(RUNS_KEY, {run: record.created_s})


def publish(client: redis.Redis, version: int, *engines: str, **fields: object) -> None:
    """What the trainer writes when `engines` (default: all leased) have proved a version."""
    leased = RunRecord.from_hash("r", client.hgetall(run_key("r"))).engines
    proved = dict.fromkeys(engines or leased, version)
    client.hset(run_key("r"), mapping=pack_fields(policy_version=version, proved=proved, **fields))


def lease(client: redis.Redis, *engines: str, version: int = 0) -> None:
    """What gateway and trainer write when these engines are leased and have proved `version`."""
    proved = dict.fromkeys(engines, version)
    client.hset(run_key("r"), mapping=pack_fields(engines=engines, proved=proved))


def envelopes(client: redis.Redis, run: str = "r", key: str = "") -> list[sequence_pb2.Envelope]:
    """What a stream of the run holds, in slot order."""
    entries = client.xrange(key or groups_key(run))
    found = [unpack(fields, run=run) for _, fields in entries]
    return sorted(found, key=lambda envelope: (envelope.id.lap, envelope.id.slot))


def without_times(envelope: sequence_pb2.Envelope) -> bytes:
    """The envelope but for what a clock and a port number put in."""
    copy = sequence_pb2.Envelope.FromString(envelope.SerializeToString())
    copy.group.ClearField("generate_s")
    copy.group.ClearField("engine")
    return copy.SerializeToString(deterministic=True)


class ScriptedEngine(pb_grpc.RolloutServiceServicer):
    """Answers every prompt with the right product as a direct guess, in equal routes.

    `abort` may name a status to end a request with, `change` may alter any message, and `go` must
    be set for answers to begin.
    """

    def __init__(self, *, deterministic: bool = True, routes: bool = True) -> None:
        self.deterministic, self.routes = deterministic, routes
        self.requests: list[pb.GenerateRequest] = []
        self.cancelled = 0
        self.max_sequence_tokens = 512
        self.run = "r"
        self.abort: Callable[[pb.GenerateRequest], grpc.StatusCode | None] = lambda request: None
        self.change: Change = lambda request, message: None
        self.go = asyncio.Event()
        self.go.set()
        self.answered = 0
        self._ids = {token: index for index, token in enumerate([PAD, END, *PRESET.alphabet])}
        self._characters = {index: token for token, index in self._ids.items()}

    async def start(self) -> str:
        """Serves on a free port; returns the address."""
        self._server, port = await rpc.serve(
            "127.0.0.1:0",
            ["keel.rollout.v1.RolloutService"],
            lambda server: pb_grpc.add_RolloutServiceServicer_to_server(self, server),
        )
        return f"127.0.0.1:{port}"

    async def stop(self) -> None:
        """Ends at once."""
        await self._server.stop(0)

    async def GetCapabilities(
        self, request: pb.GetCapabilitiesRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetCapabilitiesResponse:
        return pb.GetCapabilitiesResponse(
            can=pb.EngineAbilities(
                kind="scripted",
                routes=self.routes,
                deterministic=self.deterministic,
                max_cohort_sequences=1024 if self.deterministic else 0,
                max_group_size=1024,
            ),
            loaded=pb.ModelSignature(
                architecture="Qwen3MoeForCausalLM",
                vocab_size=64,
                max_sequence_tokens=self.max_sequence_tokens,
                moe_layers=range(LAYERS),
                experts_per_token=TOP_K,
                num_experts=EXPERTS,
            ),
            state=pb.ENGINE_STATE_READY,
            run=self.run,
        )

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> None:
        self.requests.append(request)
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if code := self.abort(request):
            await context.abort(code, "scripted")
        for sample in range(request.num_samples):
            for message in self._answer(request, sample):
                self.change(request, message)
                await context.write(message)
        self.answered += 1

    def _answer(self, request: pb.GenerateRequest, sample: int) -> list[pb.GenerateResponse]:
        prompt_P = to_ndarray(request.prompt_token_ids, "p", dtypes=("int32",), shape=(None,))
        a, b = "".join(self._characters[i] for i in prompt_P.tolist()).rstrip("=").split("*")
        ids = [self._ids[character] for character in f"={int(a) * int(b)}"] + [self._ids[END]]
        rows = len(prompt_P) + len(ids) - 1
        routes = np.tile(np.arange(TOP_K, dtype=np.uint8), (rows, LAYERS, 1))
        tokens, late, end = (pb.GenerateResponse() for _ in range(3))
        tokens.chunk.sample = late.chunk.sample = end.complete.sample = sample
        fill(tokens.chunk.token_ids, np.array(ids, np.int32))
        fill(tokens.chunk.rollout_logprobs, np.full(len(ids), -0.5, np.float32))
        if request.with_routes:
            fill(tokens.chunk.routes, routes[:2])
            fill(late.chunk.routes, routes[2:])
            end.complete.route_rows = rows
            end.complete.routes_valid = True
            end.complete.routes_xxh3 = xxh3(routes)
        end.complete.finish_reason = sequence_pb2.FINISH_REASON_STOP
        end.complete.response_tokens = len(ids)
        end.complete.policy_versions.add(
            span=sequence_pb2.Span(begin=len(prompt_P), end=rows + 1),
            policy_version=request.require_policy_version,
        )
        return [tokens, late, end] if request.with_routes else [tokens, end]
