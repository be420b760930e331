"""`keel-engine`: one inference engine behind the RolloutService. Starts EMPTY."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import logging
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from keel import rpc, telemetry
from keel.errors import InvalidField
from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.rollout.v1 import rollout_service_pb2_grpc as pb_grpc
from keel_rollout import engine_metrics
from keel_rollout.engines.base import Engine
from keel_rollout.servicer import RolloutServicer

log = logging.getLogger("keel.engine")

KINDS = {"torch": "keel_rollout.engines.torch", "vllm": "keel_rollout.engines.vllm"}
"""Module of each kind, with `create(device, threads)`. Only the chosen one is imported."""

GRACE_S = 5.0
"""How long calls in flight may take to end after SIGTERM."""

EPILOG = """\
The engine starts without a model. A trainer gives it one by LoadModel, then weights by
BeginWeightUpdate, UpdateWeights and FinishWeightUpdate; from then on it serves Generate.
Every flag has an environment variable of the same meaning; the flag wins.

examples:
  keel-engine                                    CPU, one thread, 127.0.0.1:50051
  keel-engine --listen 127.0.0.1:0               a free port; the log says which
  keel-engine --device cuda --shared /mnt/keel   GPU; weights also as files under /mnt/keel
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = argparse.ArgumentParser(
        prog="keel-engine",
        description="One rollout engine: a model behind Keel's protobuf contract.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parse.add_argument("--kind", choices=sorted(KINDS), default="torch", help="what computes")
    parse.add_argument(
        "--listen",
        metavar="HOST:PORT",
        default=os.environ.get("KEEL_ENGINE_LISTEN", "127.0.0.1:50051"),
        help="address to serve on; port 0 takes a free one [KEEL_ENGINE_LISTEN, %(default)s]",
    )
    parse.add_argument(
        "--device",
        default=os.environ.get("KEEL_DEVICE", "cpu"),
        help="cpu, cuda or cuda:N [KEEL_DEVICE, %(default)s]",
    )
    parse.add_argument(
        "--threads",
        type=int,
        default=os.environ.get("KEEL_TORCH_THREADS", "1"),
        help="CPU threads that compute; the number changes rounding, so keep it fixed for "
        "reproducible runs [KEEL_TORCH_THREADS, %(default)s]",
    )
    parse.add_argument(
        "--shared",
        metavar="DIR",
        type=Path,
        default=os.environ.get("KEEL_SHARED_DIR"),
        help="storage that trainers share, for weights by reference; without it weights come by "
        "stream only [KEEL_SHARED_DIR]",
    )
    parse.add_argument(
        telemetry.FLAG,
        metavar="HOST:PORT",
        default=os.environ.get("KEEL_ENGINE_METRICS", ""),
        help=f"{telemetry.HELP} [KEEL_ENGINE_METRICS, off]",
    )
    return parse


def create(kind: str, device: str, threads: int) -> Engine:
    """An EMPTY engine of a kind in KINDS."""
    return importlib.import_module(KINDS[kind]).create(device, threads)


async def serve(arguments: argparse.Namespace) -> None:
    """Serves until SIGTERM or SIGINT; sequences in flight then end ABORTED."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    engine = create(arguments.kind, arguments.device, arguments.threads)
    servicer = RolloutServicer(engine, arguments.shared)
    engine_metrics.tell(servicer.state, servicer.served_version)
    telemetry.serve_metrics(arguments.metrics)
    name = pb.DESCRIPTOR.services_by_name["RolloutService"].full_name
    server, port = await rpc.serve(
        arguments.listen,
        [name],
        lambda server: pb_grpc.add_RolloutServiceServicer_to_server(servicer, server),
    )
    host = arguments.listen.rpartition(":")[0]
    log.info("engine %s on %s listens on %s:%d", arguments.kind, arguments.device, host, port)
    await stop.wait()
    log.info("stopping")
    await engine.close()
    await server.stop(GRACE_S)


def main(argv: Sequence[str] | None = None) -> None:
    """Console script."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    parse = parser()
    arguments = parse.parse_args(argv)
    if arguments.threads < 1:
        parse.error(f"--threads: {arguments.threads} is not valid; valid: 1 or more")
    try:
        asyncio.run(serve(arguments))
    except InvalidField as error:
        parse.error(str(error))


if __name__ == "__main__":
    main()
