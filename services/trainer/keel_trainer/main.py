"""`keel-trainer`: the trainer service."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
from pathlib import Path

from prometheus_client import REGISTRY

from keel.blobs import BlobStore
from keel.errors import InvalidField
from keel.rpc import serve
from keel.telemetry import FLAG, HELP, serve_metrics
from keel.trainer.v1 import trainer_service_pb2_grpc
from keel_trainer.servicer import ChildOptions, TrainerServicer
from keel_trainer.store import UNREACHABLE, connect
from keel_trainer.telemetry import TrainingCollector

log = logging.getLogger(__name__)

_DESCRIPTION = """Trains runs on request (gRPC, keel.trainer.v1.TrainerService), one child process
a run. The gateway starts runs; their records, data and metrics are in Redis, their checkpoints
under --runs."""


def _parser() -> argparse.ArgumentParser:
    env = os.environ.get
    parser = argparse.ArgumentParser(
        prog="keel-trainer",
        description=_DESCRIPTION,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--listen",
        default=env("KEEL_TRAINER_LISTEN", "127.0.0.1:50061"),
        help="host:port to serve on; port 0 takes a free one (KEEL_TRAINER_LISTEN)",
    )
    parser.add_argument(
        "--redis",
        default=env("KEEL_REDIS_URL", "redis://127.0.0.1:6379/0"),
        help="redis:// or unix:// URL (KEEL_REDIS_URL)",
    )
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path(env("KEEL_RUNS_DIR", "runs")),
        help="folder for artifacts, checkpoints and models (KEEL_RUNS_DIR)",
    )
    parser.add_argument(
        "--device", default=env("KEEL_DEVICE", "cpu"), help="cpu or cuda (KEEL_DEVICE)"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=int(env("KEEL_TORCH_THREADS", "1")),
        help="torch threads; they enter the rounding, so keep them fixed (KEEL_TORCH_THREADS)",
    )
    parser.add_argument(
        "--weights",
        metavar="DIR",
        type=Path,
        default=env("KEEL_WEIGHTS_DIR"),
        help="folder that engines know as their --shared, under /dev/shm say: weights then go "
        "through a file in it, and by stream to engines that do not see it (KEEL_WEIGHTS_DIR)",
    )
    parser.add_argument(
        "--blobs",
        metavar="FOLDER|URL",
        type=_blobs,
        default=env("KEEL_BLOBS", ""),
        help="the collector's --blobs: where it puts what is too large for the queue (KEEL_BLOBS)",
    )
    parser.add_argument(
        FLAG,
        metavar="HOST:PORT",
        default=env("KEEL_TRAINER_METRICS", ""),
        help=f"{HELP} (KEEL_TRAINER_METRICS)",
    )
    return parser


def _blobs(root: str) -> str:
    try:
        BlobStore(root)
    except (ImportError, ValueError) as error:  # no such protocol, or its package is missing
        raise argparse.ArgumentTypeError(f"{root!r} is not valid: {error}") from error
    return root


async def _serve(args: argparse.Namespace) -> None:
    weights = args.weights.resolve() if args.weights else None
    options = ChildOptions(
        *(args.redis, args.runs.resolve(), args.device, args.threads),
        weights=weights,
        blobs=args.blobs,
    )
    servicer = TrainerServicer(options)
    if args.metrics:
        REGISTRY.register(TrainingCollector(connect(args.redis, retries=0), servicer.running))
    serve_metrics(args.metrics)
    server, port = await serve(
        args.listen,
        ["keel.trainer.v1.TrainerService"],
        lambda server: trainer_service_pb2_grpc.add_TrainerServiceServicer_to_server(
            servicer, server
        ),
    )
    log.info("listening on %s, port %d", args.listen, port)
    sweeping = asyncio.create_task(_sweep(servicer))
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    await stop.wait()
    log.info("stopping")
    sweeping.cancel()
    await server.stop(grace=1.0)
    await servicer.close()


async def _sweep(servicer: TrainerServicer) -> None:
    """At the start only: what is left later is found at the next one."""
    try:
        await servicer.sweep()
    except (OSError, *UNREACHABLE) as error:
        log.warning("the blob store is not swept: %s", error)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the console script."""
    args = _parser().parse_args(argv)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        asyncio.run(_serve(args))
    except InvalidField as error:
        _parser().error(str(error))


if __name__ == "__main__":
    main()
