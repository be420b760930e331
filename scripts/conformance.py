"""`make conformance`: tries every engine of this checkout, on tiny models, and prints the tables.

    torch     float32 and bfloat16, and a dense model
    vllm      bfloat16, where .venv-vllm (make engine-vllm) or KEEL_VLLM_PYTHON has it
    minimal   examples/engine_minimal, float32

Exit status 1 if any of them fails a row. What was not run is said, with the reason.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENGINE = ("-m", "keel_rollout.engine_main")
MINIMAL = ROOT / "examples" / "engine_minimal" / "engine.py"
VLLM = Path(os.environ.get("KEEL_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
KEEL = (sys.executable, "-c", "from keel_gateway.cli import main; main()", "conformance")
GOOD, NOT_RUN = "keeps the contract", "NOT RUN"
SPARSE, DENSE = "preset:tiny-qwen3-moe", "preset:tiny-qwen3"


@contextlib.contextmanager
def engine(command: list[str]) -> Iterator[str]:
    """A process that serves on a free port; yields its address."""
    process = subprocess.Popen(
        [*command, "--listen", "127.0.0.1:0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    try:
        said = ""
        for line in process.stdout:
            said += line
            found = re.search(r"listens on (127\.0\.0\.1:\d+)", line)
            if found:
                break
        else:
            raise RuntimeError(f"{' '.join(command)} did not start:\n{said[-2000:]}")
        # read on, so that the engine never blocks on a full pipe
        threading.Thread(target=lambda: [None for _ in process.stdout or ()], daemon=True).start()
        yield found[1]
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def tried(name: str, command: list[str], *trials: tuple[str, ...]) -> dict[str, str]:
    """What came of each trial of one engine."""
    found = {}
    with engine(command) as address:
        for trial in trials:
            title = f"{name} {' '.join(trial)}"
            print(f"\n=== {title}", flush=True)
            status = subprocess.run([*KEEL, address, *trial], check=False, cwd=ROOT).returncode
            found[title] = {0: GOOD, 1: "FAILS"}.get(status, "COULD NOT BE TRIED")
    return found


def main() -> None:
    """Tries them one after another."""
    with tempfile.TemporaryDirectory(prefix="keel-conformance-") as folder:
        shared = ("--shared", folder)
        bfloat16 = ("--dtype", "bfloat16", *shared)
        found = tried(
            "torch",
            [sys.executable, *ENGINE, "--kind", "torch", *shared],
            ("--model", SPARSE, "--dtype", "float32", *shared),
            ("--model", SPARSE, *bfloat16),
            ("--model", DENSE, "--dtype", "float32", *shared),
        )
        if VLLM.is_file():
            command = [str(VLLM), *ENGINE, "--kind", "vllm", *shared]
            found |= tried("vllm", command, ("--model", SPARSE, *bfloat16))
        else:
            found["vllm"] = f"{NOT_RUN}: no {VLLM}; make engine-vllm makes it"
        if MINIMAL.is_file():
            found |= tried("minimal", [sys.executable, str(MINIMAL)], ("--model", SPARSE))
        else:
            found["minimal"] = f"{NOT_RUN}: no {MINIMAL}"
    print("\n=== Conformance")
    for title, came in found.items():
        print(f"{came:<20} {title.replace(folder, 'DIR')}")
    sys.exit(any(came != GOOD and not came.startswith(NOT_RUN) for came in found.values()))


if __name__ == "__main__":
    main()
