"""One verifier process: JSON lines in, one JSON line out for each response. Started by `verify`.

    in   {"verifier": "multiplication", "cpu_limit_s": 2.0, "cases": [[prompt, response, reference],
          ...]}
    out  {"reward": 1.0, "parts": {"correct": 1.0}}   or   {"error": "ValueError: ..."}

Answers leave one by one and unbuffered, so that whoever started the process knows at which response
it died. Light on purpose: a worker that a verifier has killed is back within a tenth of a second.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

from keel_rollout.collector.tasks.base import Verifier
from keel_rollout.collector.tasks.multiplication import MultiplicationVerifier

VERIFIERS: Mapping[str, Verifier] = {"multiplication": MultiplicationVerifier()}
"""By the name in [task] of a job file."""

_ERROR_CHARACTERS = 300


def serve(verifiers: Mapping[str, Verifier] = VERIFIERS) -> None:
    """Answers until stdin ends."""
    # what a verifier prints must not pass for an answer
    answers = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    # the default action ends the process even inside C code, which a Python handler cannot
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        verifier = verifiers[request["verifier"]]
        for case in request["cases"]:
            # counts the CPU time of this process alone: a pause of the machine costs nothing
            signal.setitimer(signal.ITIMER_PROF, request["cpu_limit_s"])
            answer = _verify(verifier, *case)
            signal.setitimer(signal.ITIMER_PROF, 0)
            os.write(answers, json.dumps(answer).encode() + b"\n")


def _verify(verifier: Verifier, prompt: str, response: str, reference: str) -> dict[str, Any]:
    try:
        verdict = verifier.verify(prompt, response, reference)
        parts = {str(name): float(value) for name, value in verdict.parts.items()}
        return {"reward": float(verdict.reward), "parts": parts}
    except BaseException as error:  # sys.exit too: whatever it raises costs this one response
        return {"error": f"{type(error).__name__}: {error}"[:_ERROR_CHARACTERS]}


if __name__ == "__main__":
    serve()
