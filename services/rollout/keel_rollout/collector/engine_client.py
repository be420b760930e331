"""One rollout engine, seen from the collector: its model, and groups sampled from it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import grpc

from keel import rpc
from keel.errors import InvalidField, StateError, WireError
from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.rollout.v1 import rollout_service_pb2_grpc
from keel_rollout.collector.responses import AbortedResponse, GroupReader, Response

CAPABILITIES_TIMEOUT_S = 10.0
GENERATE_TIMEOUT_S = 3600.0
"""For an engine that is alive but stuck; keepalive finds a dead one within a minute. Waiting for
other cohorts counts, so it is generous."""
_WINDOWS = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 2**20))
"""A group's stream runs ahead of its reader by 1 MiB at most. Left to itself, gRPC makes it 16."""


class EngineFailure(Exception):
    """The engine cannot answer now: down, loading, paused, overtaken. Recovery: send again."""


@dataclass(frozen=True)
class EngineModel:
    """What an engine can do and what it has loaded."""

    can: pb.EngineAbilities
    signature: pb.ModelSignature

    @property
    def routed(self) -> bool:
        """Routes are to be had."""
        return self.can.routes and len(self.signature.moe_layers) > 0

    def check(self, *, group_size: int, cohort_sequences: int) -> None:
        """Raises InvalidField for groups or cohorts that the engine never takes."""
        if group_size > self.can.max_group_size:
            raise InvalidField(
                "rollout.group_size", group_size, f"1 to {self.can.max_group_size} on this engine"
            )
        if self.can.deterministic and cohort_sequences > self.can.max_cohort_sequences:
            raise InvalidField(
                "cohort sequences",
                cohort_sequences,
                f"1 to {self.can.max_cohort_sequences} on this engine",
            )


class EngineClient:
    """A channel to one engine: EngineFailure for what may pass, a KeelError for what may not."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._channel = rpc.aio_channel(address, _WINDOWS)
        self._stub = rollout_service_pb2_grpc.RolloutServiceStub(self._channel)

    async def model(self, run: str) -> EngineModel:
        """What the engine has loaded, once that is `run`'s model."""
        try:
            reply: pb.GetCapabilitiesResponse = await self._stub.GetCapabilities(
                pb.GetCapabilitiesRequest(), timeout=CAPABILITIES_TIMEOUT_S
            )
        except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.CancelledError) as error:
            raise self._failure(error) from error
        if not reply.HasField("loaded") or reply.run != run:
            raise EngineFailure(
                f"engine {self.address} is {pb.EngineState.Name(reply.state)}, loaded for run "
                f"{reply.run!r}; waiting for {run!r}"
            )
        return EngineModel(reply.can, reply.loaded)

    async def generate(self, request: pb.GenerateRequest, model: EngineModel) -> list[Response]:
        """The group's responses."""
        reader = GroupReader(
            model.signature,
            samples=request.num_samples,
            prompt_tokens=request.prompt_token_ids.shape[0],
            with_routes=request.with_routes,
        )
        call = self._stub.Generate(request, timeout=GENERATE_TIMEOUT_S)
        try:
            async for message in call:
                reader.add(message)
            return reader.responses()
        except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.CancelledError) as error:
            raise self._failure(error) from error
        except AbortedResponse as error:
            raise EngineFailure(f"engine {self.address}: {error}") from error
        except WireError as error:
            raise WireError(f"engine {self.address} breaks the contract: {error}") from error
        finally:
            call.cancel()

    async def close(self) -> None:
        """Closes the channel; calls under way are cancelled."""
        await self._channel.close()

    def _failure(self, error: BaseException) -> BaseException:
        """What to raise in place of an error of gRPC."""
        if isinstance(error, grpc.aio.AioRpcError):
            message = f"engine {self.address}: {error.code().name}: {error.details()}"
            return (StateError if error.code() in rpc.FINAL else EngineFailure)(message)
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            return error
        # another cohort has moved to a new engine and closed this channel under the call
        return EngineFailure(f"engine {self.address}: the channel is closed")
