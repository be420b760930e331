"""One verifier process: JSON lines in, JSON lines out. Started by `verify`.

    in   {"verifiers": [{"name": "math", "part": "math", "weight": 1.0, ...}], "cpu_limit_s": 2.0,
          "load_limit_s": 60.0, "cases": [{"prompt": ..., "response": ..., "answer": ...}, ...]}
    out  {}                                              the verifiers are loaded, or an error;
         {"reward": 1.0, "parts": {"math": 1.0}}         then a line for each response
         {"error": "math raised ValueError: ..."}

Answers leave one by one and unbuffered, so that whoever started the process knows at which response
it died. Light on purpose: a worker that a verifier has killed is back within a tenth of a second.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from keel_rollout.collector.tasks.base import Case, Verifier
from keel_rollout.collector.verifiers import BUILT_IN, Options, VerifierFault, build

_ERROR_CHARACTERS = 300


def serve(built_in: Mapping[str, Any] = BUILT_IN) -> None:
    """Answers until stdin ends.

    Args:
        built_in: what makes a verifier from its options, by name.
    """
    # what a verifier prints must not pass for an answer
    answers = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    # the default action ends the process even inside C code, which a Python handler cannot
    signal.signal(signal.SIGPROF, signal.SIG_DFL)

    def answer(content: dict[str, Any]) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        os.write(answers, json.dumps(content).encode() + b"\n")

    loaded: dict[str, Verifier] = {}
    for line in sys.stdin.buffer:
        request = json.loads(line)
        # counts the CPU time of this process alone: a pause of the machine costs nothing
        signal.setitimer(signal.ITIMER_PROF, request["load_limit_s"])
        verifier, error = _load(request["verifiers"], built_in, loaded)
        answer({"error": error} if error else {})
        if verifier is None:
            continue
        for case in request["cases"]:
            signal.setitimer(signal.ITIMER_PROF, request["cpu_limit_s"])
            answer(_verify(verifier, Case(**case)))


def _load(
    options: Sequence[Options], built_in: Mapping[str, Any], loaded: dict[str, Verifier]
) -> tuple[Verifier | None, str]:
    key = json.dumps(options, sort_keys=True)
    try:
        if key not in loaded:
            loaded[key] = build(options, built_in)
        return loaded[key], ""
    except BaseException as error:  # of a module that is not ours
        return None, f"{type(error).__name__}: {error}"[:_ERROR_CHARACTERS]


def _verify(verifier: Verifier, case: Case) -> dict[str, Any]:
    try:
        verdict = verifier.verify(case)
        return {"reward": verdict.reward, "parts": verdict.parts}
    except VerifierFault as error:
        return {"error": str(error)[:_ERROR_CHARACTERS]}
    except BaseException as error:  # sys.exit too: whatever it raises costs this one response
        return {"error": f"raised {type(error).__name__}: {error}"[:_ERROR_CHARACTERS]}


if __name__ == "__main__":
    serve()
