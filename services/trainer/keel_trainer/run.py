"""The child process of one run: `python -m keel_trainer.run`. Leaves the phase in the record."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading
from pathlib import Path

import redis
import torch

from keel.blobs import BlobStore
from keel.errors import FencedError, KeelError
from keel.record import Phase
from keel_trainer.loop import CancelledError, TrainingRun
from keel_trainer.storage import drop_blobs
from keel_trainer.store import RunLostError, RunStore, connect

log = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """Exit status 0: the record holds a final phase. Otherwise it is to be started again."""
    parser = argparse.ArgumentParser(prog="keel_trainer.run", description=__doc__)
    parser.add_argument("--run", required=True, help="run id; its record must exist")
    parser.add_argument(
        "--redis",
        default=os.environ.get("KEEL_REDIS_URL"),
        help="redis:// or unix:// URL; better by KEEL_REDIS_URL, where `ps` shows no password",
    )
    parser.add_argument("--runs", required=True, type=Path, help="folder of all runs")
    parser.add_argument("--fencing-token", required=True, type=int, help="token of the lease")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--weights", type=Path, help="folder for weights by reference")
    parser.add_argument("--blobs", help="folder or URL of what is too large for the queue")
    parser.add_argument("--threads", default=1, type=int, help="torch threads; enters the rounding")
    args = parser.parse_args(argv)
    logging.basicConfig(
        level=logging.INFO, format=f"%(asctime)s %(levelname)s {args.run} %(name)s: %(message)s"
    )
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True, warn_only=args.device != "cpu")
    threading.Thread(target=_end_with_parent, daemon=True).start()
    store = RunStore(connect(args.redis), args.run, args.fencing_token)
    try:
        return _train(store, args)
    except FencedError as error:
        log.warning("%s", error)
    except RunLostError as error:
        log.error("stopped: %s; its checkpoints stay in %s", error, args.runs / args.run)
    except redis.RedisError as error:
        # whatever it is, the run's data is as it was: it is started again
        log.warning("Redis fails, giving up for now: %s: %s", type(error).__name__, error)
        return 1
    return 0


def _train(store: RunStore, args: argparse.Namespace) -> int:
    blobs = BlobStore(args.blobs) if args.blobs else None
    try:
        if not store.read().phase.final:
            TrainingRun.open(
                store,
                connect(args.redis, retries=0),
                args.runs / args.run,
                device=args.device,
                weights=args.weights,
                blobs=blobs,
            ).train()
            store.end(Phase.SUCCEEDED)
    except CancelledError:
        log.info("cancelled")
        store.end(Phase.CANCELLED)
    except (FencedError, RunLostError, redis.RedisError):
        raise
    except Exception as error:
        # whatever it was, its user must read it in the record
        log.exception("run failed")
        text = str(error) if isinstance(error, KeelError) else f"{type(error).__name__}: {error}"
        store.end(Phase.FAILED, error=text)
    drop_blobs(blobs, args.run)
    return 0


def _end_with_parent() -> None:
    """Ends this process when the service is gone, whatever killed it: two trainers of one run would
    take each other's groups.
    """
    # the bare descriptor: a thread that holds sys.stdin's lock makes the interpreter's exit fatal
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
