"""`examples/engine_minimal` as a process, for tests."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "examples" / "engine_minimal"


@contextlib.contextmanager
def minimal_process() -> Iterator[tuple[str, subprocess.Popen]]:
    """The engine on a free port; yields its address and process."""
    command = [sys.executable, str(FOLDER / "engine.py"), "--listen", "127.0.0.1:0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            found = re.fullmatch(r"listens on (\S+)\n", process.stdout.readline())
            assert found, "the engine did not start"
            yield found[1], process
        finally:
            process.terminate()
