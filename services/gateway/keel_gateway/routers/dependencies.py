"""What routes are given: the parts of the gateway, and a body that was checked."""

from __future__ import annotations

import tomllib
from typing import Annotated, Any

from fastapi import Depends, Path, Request
from pydantic import ValidationError
from pydantic_core import from_json

from keel.errors import InvalidField, LimitError
from keel.spec import RunSpec, spec_errors
from keel_gateway.feeds import Feeds
from keel_gateway.problems import Refused, UnsupportedMediaType
from keel_gateway.registry import Registry
from keel_gateway.scheduler import Scheduler
from keel_gateway.store import Store

MOST_BODY_BYTES = 2**20
"""Of a request. A spec has some hundreds."""


async def run_spec(request: Request) -> RunSpec:
    """The RunSpec in the body, or a problem that names everything wrong with it."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # A browser sends other types across origins without asking first.
    if kind not in ("application/json", "application/toml"):
        raise UnsupportedMediaType(
            f"content-type: {kind!r} is not valid; valid: application/json, application/toml"
        )
    body = await _body(request)
    try:
        data = _decode(kind, body)
    except (ValueError, RecursionError) as error:
        language = "TOML" if kind.endswith("toml") else "JSON"
        fault = InvalidField("body", str(error), f"a RunSpec in {language}, UTF-8")
        raise Refused([fault], 400) from error
    try:
        return RunSpec.model_validate(data)
    except ValidationError as error:
        raise Refused(spec_errors(error)) from error


def _decode(kind: str, body: bytes) -> Any:
    if kind == "application/toml":
        return tomllib.loads(body.decode())
    return from_json(body, allow_inf_nan=False)


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MOST_BODY_BYTES:
            raise LimitError(f"body: more than {MOST_BODY_BYTES} bytes; valid: up to that")
    return bytes(body)


def _store(request: Request) -> Store:
    store: Store = request.app.state.store
    return store


def _registry(request: Request) -> Registry:
    registry: Registry = request.app.state.registry
    return registry


def _scheduler(request: Request) -> Scheduler:
    scheduler: Scheduler = request.app.state.scheduler
    return scheduler


def _feeds(request: Request) -> Feeds:
    feeds: Feeds = request.app.state.feeds
    return feeds


RunId = Annotated[str, Path(description="The job's id.", max_length=80)]
SpecBody = Annotated[RunSpec, Depends(run_spec)]
FeedsDep = Annotated[Feeds, Depends(_feeds)]
StoreDep = Annotated[Store, Depends(_store)]
RegistryDep = Annotated[Registry, Depends(_registry)]
SchedulerDep = Annotated[Scheduler, Depends(_scheduler)]
