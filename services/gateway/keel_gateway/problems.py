"""Every error as problem+json (RFC 9457), from one table.

`errors` names field, value and what would be valid for each fault of a request.
"""

from __future__ import annotations

import http
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from redis.exceptions import RedisError
from starlette.exceptions import HTTPException

from keel.errors import InvalidField, KeelError, LimitError, NotFound, StateError
from keel_gateway import redis_trouble

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
MOST_ERRORS = 50
"""Faults named in one answer."""
MOST_CHARACTERS = 200
"""Of a value that is repeated in an answer."""
RETRY_AFTER_S = 2

JSONValue = str | int | float | bool | None


class FieldProblem(BaseModel):
    """One fault of a request."""

    field: str = Field(description="Which field, dotted.", examples=["recipe.steps"])
    value: JSONValue = Field(description="What it is now; shortened if long.", examples=[-3])
    valid: str = Field(description="What would be valid.", examples=["greater than or equal to 1"])


class Problem(BaseModel):
    """What went wrong (RFC 9457)."""

    type: str = Field(description="Kind of problem.", examples=["urn:keel:problem:invalid-spec"])
    title: str = Field(description="The kind, in words.", examples=["The request is not valid"])
    status: int = Field(description="HTTP status.", examples=[422])
    detail: str = Field(description="This very problem, for people to read.")
    instance: str = Field(description="Path of the request.", examples=["/v1/jobs"])
    errors: list[FieldProblem] = Field(default=[], description="Each fault of the request.")


class Refused(KeelError):
    """A request that its sender can mend, with every fault named."""

    def __init__(self, errors: Sequence[InvalidField], status: int = 422) -> None:
        self.errors, self.http_status = errors, status
        super().__init__("; ".join(str(error) for error in errors[:3]))


class NotReady(KeelError):
    """The gateway cannot do its work now; the message says what is missing. Retry."""


class UnsupportedMediaType(KeelError):
    """A body in a format that is not read here."""


_TITLES = {
    400: ("malformed", "The body cannot be parsed"),
    404: ("not-found", "There is no such thing"),
    405: ("method-not-allowed", "The method does not exist on this path"),
    409: ("conflict", "The state of the run forbids it"),
    413: ("too-large", "The body is too large"),
    415: ("unsupported-media-type", "The body's format is not read here"),
    422: ("invalid", "The request is not valid"),
    500: ("internal", "A fault of the gateway"),
    503: ("unavailable", "The gateway cannot do this now"),
}

_STATUS: Sequence[tuple[type[KeelError], int]] = (
    (InvalidField, 422),
    (NotFound, 404),
    (StateError, 409),
    (LimitError, 413),
    (UnsupportedMediaType, 415),
    (NotReady, 503),
)


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI entries for the problems that a route answers with."""
    return {
        status: {
            "description": _TITLES[status][1],
            "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
        for status in statuses
    }


def problem(
    request: Request,
    status: int,
    detail: str,
    *,
    errors: Sequence[InvalidField] = (),
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """An answer that says what is wrong."""
    kind, title = _TITLES.get(status, ("http", http.HTTPStatus(status).phrase))
    body = Problem(
        type=f"urn:keel:problem:{kind}",
        title=title,
        status=status,
        detail=_short(detail, 2000),
        instance=request.url.path,
        errors=[
            FieldProblem(field=_short(e.field), value=_echo(e.value), valid=_short(e.valid, 2000))
            for e in errors[:MOST_ERRORS]
        ],
    )
    headers = {**(headers or {}), **({"Retry-After": str(RETRY_AFTER_S)} if status == 503 else {})}
    return JSONResponse(body.model_dump(), status, headers=headers, media_type=MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Makes every error of `app` a problem, in its answers and in its OpenAPI."""
    plain_openapi = app.openapi

    def openapi() -> dict[str, Any]:
        schema = plain_openapi()
        own = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
        schema["components"]["schemas"] |= own.pop("$defs") | {"Problem": own}
        return schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to extend it

    @app.exception_handler(KeelError)
    async def _keel(request: Request, error: KeelError) -> JSONResponse:
        if isinstance(error, Refused):
            return problem(request, error.http_status, str(error), errors=error.errors)
        for kind, status in _STATUS:
            if isinstance(error, kind):
                named = [error] if isinstance(error, InvalidField) else []
                return problem(request, status, str(error), errors=named)
        log.error("%s %s: %s", request.method, request.url.path, error)
        return problem(request, 500, str(error))

    @app.exception_handler(RequestValidationError)
    async def _parameters(request: Request, error: RequestValidationError) -> JSONResponse:
        named = [
            InvalidField(".".join(map(str, item["loc"][1:])), item.get("input"), item["msg"])
            for item in error.errors()
        ]
        return problem(request, 422, "; ".join(map(str, named)), errors=named)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        detail = f"{request.method} {request.url.path}: {error.detail}; /docs lists what there is"
        return problem(request, error.status_code, detail, headers=error.headers)

    @app.exception_handler(RedisError)
    async def _redis(request: Request, error: RedisError) -> JSONResponse:
        log.warning("%s %s: Redis: %s", request.method, request.url.path, error)
        return problem(request, 503, redis_trouble.describe(error))

    @app.exception_handler(Exception)
    async def _bug(request: Request, error: Exception) -> JSONResponse:
        # starlette raises it again, and the server logs the traceback
        return problem(request, 500, f"{type(error).__name__}; the gateway's log has more")


def _short(text: str, most: int = MOST_CHARACTERS) -> str:
    return text if len(text) <= most else text[:most] + "..."


def _echo(value: object) -> JSONValue:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) < 2**53:
        return value
    return _short(value if isinstance(value, str) else repr(value))
