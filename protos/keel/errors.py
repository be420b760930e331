"""Errors, named by the boundary that was crossed.

Every message names the field, the offending value, and what would be valid. To add one: subclass
`KeelError`, give it the gRPC status its callers should see, and say in its docstring who may
recover from it. A bad rollout is data, not an error: it is masked and counted.
"""

from __future__ import annotations

import grpc


class KeelError(Exception):
    """Root of every error that Keel raises on purpose."""

    status = grpc.StatusCode.INTERNAL


class InvalidField(KeelError, ValueError):
    """A caller's value is wrong. The caller can mend it; a retry cannot.

    Example:
        InvalidField("num_samples", 0, "1 to 1024")
        -> "num_samples: 0 is not valid; valid: 1 to 1024"
    """

    status = grpc.StatusCode.INVALID_ARGUMENT

    def __init__(self, field: str, value: object, valid: str) -> None:
        self.field, self.value, self.valid = field, value, valid
        shown = repr(value)
        if len(shown) > 200:
            shown = shown[:200] + "..."
        super().__init__(f"{field}: {shown} is not valid; valid: {valid}")


class DatasetError(InvalidField):
    """A data file cannot be used; the message says where it is wrong. Its owner can mend it.

    Example:
        DatasetError("task.dataset", "/d/train.jsonl", "line 3, answer: missing ...")
        -> "task.dataset: /d/train.jsonl: line 3, answer: missing ..."
    """

    def __init__(self, field: str, path: object, problem: str) -> None:
        self.field, self.value, self.valid = field, str(path), problem
        KeelError.__init__(self, f"{field}: {path}: {problem}")


class WireError(KeelError):
    """Bytes from another process are not what the contract says. Not retried."""

    status = grpc.StatusCode.INVALID_ARGUMENT


class StateError(KeelError):
    """The receiver's state forbids the call; the message says which state would allow it."""

    status = grpc.StatusCode.FAILED_PRECONDITION


class LimitError(KeelError):
    """A request exceeds an advertised limit."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED


class FencedError(KeelError):
    """The caller's lease is over: a newer fencing token was seen. The caller must stop."""

    status = grpc.StatusCode.PERMISSION_DENIED


class OvertakenError(KeelError):
    """A newer try of the same work replaced this one. Its caller drops it."""

    status = grpc.StatusCode.ABORTED


class IntegrityError(KeelError):
    """Bytes differ from their hash, or an engine's log-probs from the trainer's."""

    status = grpc.StatusCode.DATA_LOSS


class NotFound(KeelError):
    """Something named does not exist."""

    status = grpc.StatusCode.NOT_FOUND


class ModelError(KeelError):
    """A model folder or configuration cannot be used; the message says what is missing."""

    status = grpc.StatusCode.INVALID_ARGUMENT
