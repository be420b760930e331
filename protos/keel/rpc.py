"""Channels, servers, and the one place where errors become gRPC status codes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from keel.errors import KeelError, WireError

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 64 * 2**20
"""Largest message either side takes. Streams chunk at 1 MiB; this leaves room for one group."""

CHUNK_BYTES = 2**20
"""Size of a chunk of weights or of a flush of tokens."""

READ_OUT_S = 10.0
"""How long the rest of a refused stream of requests is read."""

FINAL = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
)
"""An engine would answer the same call the same way. Anything else is its trouble and may pass."""

OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    # below the client's keepalive, or the server would punish it with GOAWAY
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.so_reuseport", 0),
    # a restarted peer is found again within seconds; the default lets two minutes pass
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 3_000),
)


def channel(address: str) -> grpc.Channel:
    """A blocking channel to "host:port"."""
    return grpc.insecure_channel(address, options=OPTIONS)


def aio_channel(address: str, options: Sequence[tuple[str, int]] = ()) -> grpc.aio.Channel:
    """An asyncio channel to "host:port"; `options` beside those of every channel."""
    return grpc.aio.insecure_channel(address, options=[*OPTIONS, *options])


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns a KeelError, raised anywhere in a servicer, into its status and message.

    Anything else is a bug of ours: logged with its traceback, INTERNAL to the caller.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        if handler.response_streaming:
            return self._wrap_stream(handler, method)
        return self._wrap_unary(handler, method)

    def _wrap_unary(self, handler: Any, method: str) -> grpc.RpcMethodHandler:
        behaviour = handler.stream_unary if handler.request_streaming else handler.unary_unary

        async def wrapped(raw: Any, context: grpc.aio.ServicerContext) -> Any:
            try:
                return await behaviour(_decoded(handler, raw, method), context)
            except Exception as error:
                if handler.request_streaming:
                    await _read_out(raw)
                await _abort(context, method, error)

        make = (
            grpc.stream_unary_rpc_method_handler
            if handler.request_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        return make(wrapped, None, handler.response_serializer)

    def _wrap_stream(self, handler: Any, method: str) -> grpc.RpcMethodHandler:
        behaviour = handler.stream_stream if handler.request_streaming else handler.unary_stream

        async def wrapped(raw: Any, context: grpc.aio.ServicerContext) -> None:
            # Health's Watch writes to the context instead of yielding
            try:
                result = behaviour(_decoded(handler, raw, method), context)
                if hasattr(result, "__aiter__"):
                    async for response in result:
                        await context.write(response)
                else:
                    await result
            except Exception as error:
                await _abort(context, method, error)

        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.request_streaming
            else grpc.unary_stream_rpc_method_handler
        )
        return make(wrapped, None, handler.response_serializer)


def _decoded(handler: Any, raw: Any, method: str) -> Any:
    """The request, or the stream of requests; WireError (not gRPC's UNKNOWN) if it is malformed."""

    def decode(data: bytes) -> Any:
        try:
            return handler.request_deserializer(data)
        except DecodeError as error:
            raise WireError(f"{method}: {len(data)} bytes are no request of it: {error}") from error

    async def decoded_stream() -> AsyncIterator[Any]:
        async for data in raw:
            yield decode(data)

    return decoded_stream() if handler.request_streaming else decode(raw)


async def _read_out(raw: AsyncIterator[bytes]) -> None:
    """Takes what is left of a refused stream, for a while: a caller that is still writing when the
    status comes may see its own failed write (INTERNAL) in place of the reason.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(READ_OUT_S):
            async for _ in raw:
                pass


async def _abort(context: grpc.aio.ServicerContext, method: str, error: Exception) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, KeelError):
        log.info("%s: %s: %s", method, error.status.name, error)
        await context.abort(error.status, str(error))
    log.exception("%s failed", method, exc_info=error)
    await context.abort(
        grpc.StatusCode.INTERNAL, f"{method} failed: {type(error).__name__}: see the server's log"
    )


async def serve(
    address: str, service_names: Sequence[str], add: Callable[[grpc.aio.Server], None]
) -> tuple[grpc.aio.Server, int]:
    """Starts a server with errors mapped, health SERVING and reflection; returns it and its port.

    Args:
        address: "host:port"; port 0 takes a free one.
        service_names: full names, e.g. "keel.rollout.v1.RolloutService".
        add: registers the servicers on the server.
    """
    server = grpc.aio.server(interceptors=[ErrorInterceptor()], options=OPTIONS)
    add(server)
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection(
        [*service_names, health.SERVICE_NAME, reflection.SERVICE_NAME], server
    )
    port = server.add_insecure_port(address)
    await server.start()
    for name in ("", *service_names):
        await health_servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
    return server, port
