"""How a gateway is set up: flags, each with an environment variable as its default."""

from __future__ import annotations

import argparse
import ipaddress
import math
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from keel.errors import InvalidField

EPILOG = """\
examples:
  one machine, a Redis on the usual port:
    python -m keel_gateway.main --engines 127.0.0.1:50051 --trainers 127.0.0.1:50061
  then:
    curl --json '{"name": "first", "model": {"path": "preset:tiny-qwen3-moe"},
                  "recipe": {"steps": 8, "off_policiness": 4}}' http://127.0.0.1:8080/v1/jobs

Redis holds the truth, so a gateway may be killed and started again at any time. Only one gateway
may run on a Redis: two would lease the same engine to different runs. API pages: /docs.
"""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a gateway needs to know.

    Example:
        Settings("127.0.0.1", 8080, "redis://127.0.0.1:6379/0",
                 engines=("127.0.0.1:50051",), trainers=("127.0.0.1:50061",))
    """

    host: str
    """Interface to listen on."""
    port: int
    """Port to listen on; 0 takes a free one."""
    redis_url: str
    """redis://, rediss:// or unix:// URL."""
    engines: tuple[str, ...] = ()
    """Engines' gRPC addresses, "host:port". Names may begin to resolve later."""
    trainers: tuple[str, ...] = ()
    """Trainers' gRPC addresses."""
    poll_s: float = 1.0
    """Seconds between two looks at an engine, a trainer or the queue."""
    lease_s: float = 60.0
    """Seconds without an answer after which a trainer or an engine loses its run to another."""


def parse_settings(arguments: Sequence[str] | None = None) -> Settings:
    """Settings from command line and environment, or InvalidField for the first that is wrong."""
    flags = _parser().parse_args(arguments)
    host, port = parse_address("--listen", flags.listen, lowest_port=0)
    if not flags.allow_remote and not is_loopback(host):
        raise InvalidField(
            "--listen",
            flags.listen,
            "a loopback address such as 127.0.0.1:8080. The gateway has no authentication yet, so "
            "whoever reaches it can start and cancel jobs; --allow-remote (KEEL_ALLOW_REMOTE=1) "
            "says that the network around it is trusted",
        )
    if not flags.redis.startswith(("redis://", "rediss://", "unix://")):
        raise InvalidField("--redis", flags.redis, "a redis://, rediss:// or unix:// URL")
    return Settings(
        host=host,
        port=port,
        redis_url=flags.redis,
        engines=_addresses("--engines", flags.engines),
        trainers=_addresses("--trainers", flags.trainers),
        lease_s=_seconds("--lease-s", flags.lease_s),
    )


def parse_address(field: str, text: str, *, lowest_port: int = 1) -> tuple[str, int]:
    """Host and port of "host:port" or "[v6]:port", or InvalidField naming `field`."""
    host, colon, port = text.strip().rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (colon and host and port.isascii() and port.isdigit() and len(port) <= 5):
        raise InvalidField(field, text, "HOST:PORT, such as 127.0.0.1:8080")
    if not lowest_port <= int(port) <= 65535:
        raise InvalidField(field, text, f"HOST:PORT with a port from {lowest_port} to 65535")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether every address that `host` stands for is reachable from this machine alone."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise InvalidField("--listen", host, f"an address of this machine ({error})") from error
    return all(ipaddress.ip_address(str(entry[4][0]).split("%")[0]).is_loopback for entry in found)


def _addresses(field: str, text: str) -> tuple[str, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    for part in parts:
        parse_address(field, part)
    if len(set(parts)) < len(parts):
        raise InvalidField(field, text, "each address once: an address is leased to one run")
    return tuple(parts)


def _seconds(field: str, text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InvalidField(field, text, "seconds, more than 0, such as 60")
    return seconds


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="keel_gateway.main",
        description="Takes jobs by REST, leases trainers and engines to them, tells how they do.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    env = os.environ.get
    parser.add_argument(
        "--listen",
        metavar="HOST:PORT",
        default=env("KEEL_LISTEN", "127.0.0.1:8080"),
        help="where to serve HTTP; port 0: a free one, which is logged [KEEL_LISTEN, %(default)s]",
    )
    parser.add_argument(
        "--redis",
        metavar="URL",
        default=env("KEEL_REDIS_URL", "redis://127.0.0.1:6379/0"),
        help="redis://, rediss:// or unix:// [KEEL_REDIS_URL]",
    )
    parser.add_argument(
        "--engines",
        metavar="HOST:PORT,...",
        default=env("KEEL_ENGINES", ""),
        help="rollout engines (gRPC); one may start, or its name resolve, later [KEEL_ENGINES]",
    )
    parser.add_argument(
        "--trainers",
        metavar="HOST:PORT,...",
        default=env("KEEL_TRAINERS", ""),
        help="trainers (gRPC); each trains one run at a time. Several must share their --runs "
        "folder: a run may move from one to another [KEEL_TRAINERS]",
    )
    parser.add_argument(
        "--lease-s",
        metavar="SECONDS",
        default=env("KEEL_LEASE_S", "60"),
        help="a trainer or an engine that has not answered for so long loses its run to another "
        "that is free, if there is one [KEEL_LEASE_S, %(default)s]",
    )
    parser.add_argument(
        "--allow-remote",
        action="store_true",
        default=env("KEEL_ALLOW_REMOTE", "") in ("1", "true", "yes"),
        help="let --listen take an address that other machines reach. There is no authentication "
        "yet: only in a network that you trust [KEEL_ALLOW_REMOTE=1]",
    )
    return parser
