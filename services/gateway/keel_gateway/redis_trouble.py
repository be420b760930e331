"""What an error of Redis means, and what to do about it, for people."""

from __future__ import annotations

from redis.exceptions import BusyLoadingError, OutOfMemoryError, ReadOnlyError, RedisError


def describe(error: RedisError) -> str:
    """One sentence. Reads go on where it says that Redis takes no writes."""
    if isinstance(error, OutOfMemoryError):
        return (
            "Redis is at its memory limit and takes no writes: raise its maxmemory (CONFIG SET "
            "maxmemory), or wait until running jobs have reached a checkpoint, which frees what it "
            "covers"
        )
    if str(error).startswith("MISCONF"):
        return f"Redis cannot write to its disk and takes no writes: make room there ({error})"
    if isinstance(error, ReadOnlyError):
        return f"Redis takes no writes: it is a replica, give the gateway the primary ({error})"
    if isinstance(error, BusyLoadingError):
        return "Redis is reading its data from disk; try again"
    return f"Redis does not answer ({type(error).__name__}); try again"
