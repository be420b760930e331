"""Console script `keel-collector`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable, Sequence

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from keel.blobs import BlobStore
from keel.errors import InvalidField
from keel.sizes import parse_bytes
from keel.spec import is_custom_verifier
from keel.telemetry import FLAG, HELP, serve_metrics
from keel_rollout.collector.follow import Follower
from keel_rollout.collector.room import QueueSettings
from keel_rollout.collector.verify import VerifierPool

log = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 5.0

_HELP = """\
The collector follows the runs recorded in Redis. For each run it sends prompts to the leased engine
(gRPC), has the responses judged in worker processes, and adds one envelope a slot to the run's
stream, where the trainer takes it. It also makes the demonstrations of the cold start and evaluates
versions on held-out prompts.

It keeps nothing: stop it, kill it or start it anew at any time, and it goes on from Redis. Run one
collector for each Redis. It serves every run at once and has no API of its own; look into its log.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs until SIGTERM or SIGINT."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        level=options.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        serve_metrics(options.metrics)
    except InvalidField as error:
        _parser().error(str(error))
    asyncio.run(
        serve(
            options.redis,
            verifier_workers=options.verifier_workers,
            verifiers=options.verifiers,
            queue=QueueSettings(options.queue_bytes, options.inline_limit, options.blobs),
        )
    )


async def serve(
    redis_url: str, *, verifier_workers: int, verifiers: Sequence[str], queue: QueueSettings
) -> None:
    """Follows the runs until SIGTERM or SIGINT; then drops what is under way and returns."""
    following = asyncio.current_task()
    assert following is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, following.cancel)
    client = connect(redis_url)
    pool = VerifierPool(verifier_workers, allowed=verifiers)
    log.info("following the runs in Redis, %d verifier workers", verifier_workers)
    try:
        with contextlib.suppress(asyncio.CancelledError):
            await Follower(client, pool, queue).follow()
    finally:
        await pool.close()
        await client.aclose()
        log.info("stopped")


def connect(redis_url: str) -> redis.asyncio.Redis:
    """A client that never repeats a command by itself: an XADD sent twice would be there twice.

    Time limits are those of `backoff`.
    """
    return redis.asyncio.Redis.from_url(
        redis_url,
        socket_timeout=None,
        socket_connect_timeout=_CONNECT_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="keel-collector",
        description=_HELP,
        epilog="Every option has an environment variable, named in brackets; the option wins.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--redis",
        metavar="URL",
        default=os.environ.get("KEEL_REDIS_URL", "redis://127.0.0.1:6379/0"),
        help="redis://HOST:PORT/DB or unix://PATH [KEEL_REDIS_URL] (now: %(default)s)",
    )
    parser.add_argument(
        "--verifier-workers",
        metavar="N",
        type=_at_least_one,
        default=os.environ.get("KEEL_VERIFIER_WORKERS", "1"),
        help="processes that judge responses [KEEL_VERIFIER_WORKERS] (now: %(default)s)",
    )
    parser.add_argument(
        "--blobs",
        metavar="FOLDER",
        type=_blobs,
        default=os.environ.get("KEEL_BLOBS", ""),
        help="where envelopes above --inline-limit go: a folder, or a URL that fsspec opens; the "
        "trainer reads them there and needs the same [KEEL_BLOBS] (now: %(default)s)",
    )
    parser.add_argument(
        "--inline-limit",
        metavar="BYTES",
        type=_size("--inline-limit"),
        default=os.environ.get("KEEL_INLINE_LIMIT", "1MiB"),
        help="largest envelope that goes through Redis itself, where there is a blob store "
        "[KEEL_INLINE_LIMIT] (now: %(default)s)",
    )
    parser.add_argument(
        "--queue-bytes",
        metavar="BYTES",
        type=_size("--queue-bytes"),
        default=os.environ.get("KEEL_QUEUE_BYTES", "8GiB"),
        help="bytes of a run that may be in flight from here to the trainer, such as 500MB or "
        "2GiB; above it the next lap waits for a checkpoint, and a job whose laps could be larger "
        "fails "
        "[KEEL_QUEUE_BYTES] (now: %(default)s)",
    )
    parser.add_argument(
        FLAG,
        metavar="HOST:PORT",
        default=os.environ.get("KEEL_COLLECTOR_METRICS", ""),
        help=f"{HELP} [KEEL_COLLECTOR_METRICS] (now: off)",
    )
    parser.add_argument(
        "--verifiers",
        metavar="MODULE:FUNCTION,...",
        type=_verifiers,
        default=os.environ.get("KEEL_VERIFIERS", ""),
        help="functions of your own that jobs may name as verifiers, importable here; nothing else "
        "is ever imported for a job [KEEL_VERIFIERS] (now: %(default)s)",
    )
    parser.add_argument(
        "--log-level",
        metavar="LEVEL",
        type=_log_level,
        default=os.environ.get("KEEL_LOG_LEVEL", "INFO"),
        help="DEBUG, INFO, WARNING or ERROR [KEEL_LOG_LEVEL] (now: %(default)s)",
    )
    return parser


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid; valid: 1 and above")
    return int(text)


def _size(flag: str) -> Callable[[str], int]:
    def size(text: str) -> int:
        try:
            return parse_bytes(text, flag)
        except InvalidField as error:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not valid; valid: {error.valid}"
            ) from None

    return size


def _blobs(root: str) -> BlobStore | None:
    try:
        return BlobStore(root) if root.strip() else None
    except (ImportError, ValueError) as error:  # no such protocol, or its package is missing
        raise argparse.ArgumentTypeError(f"{root!r} is not valid: {error}") from error


def _verifiers(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if not is_custom_verifier(name):
            raise argparse.ArgumentTypeError(f"{name!r} is not valid; valid: module:function")
    return names


def _log_level(text: str) -> str:
    level = text.upper()
    if level not in {"DEBUG", "INFO", "WARNING", "ERROR"}:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid; valid: DEBUG ... ERROR")
    return level


if __name__ == "__main__":
    main()
