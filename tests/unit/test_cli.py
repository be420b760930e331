"""`keel` against a small HTTP server that answers as the gateway does."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import typer
from clikit import ENGINE, TOML, Gateway, job, row
from rich.console import Console

from keel.record import Desired, Phase
from keel_gateway import cli_group, client
from keel_gateway.client import GatewayClient, Unreachable, find_url
from keel_gateway.follow import View, follow
from keel_gateway.watch import curve, line, numbers, panel, watch

pytest_plugins = ["cli_fixtures"]


def test_submit_sends_what_the_file_says_and_no_defaults(
    keel: Callable[..., Any], gateway: Gateway, file: str
) -> None:
    gateway.answers["POST", "/v1/jobs"] = (201, job().model_dump(mode="json"))
    result = keel("submit", file)
    assert result.exit_code == 0
    assert result.said.split() == ["first-abcdef"]
    assert gateway.asked[0][2] == {
        "name": "first",
        "model": {"path": "preset:tiny-qwen3-moe"},
        "recipe": {"steps": 8, "off_policiness": 4},
    }


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (TOML.replace("steps = 8", "steps = 9"), ["recipe.steps: 9", "12"]),
        (
            TOML.replace("steps = 8", "stepz = 8"),
            ["recipe.steps: 'missing'", "recipe.stepz", "no such key"],
        ),
        (TOML.replace("name", "name name"), ["job.toml", "TOML"]),
    ],
)
def test_a_bad_file_is_refused_before_it_is_sent(
    keel: Callable[..., Any], gateway: Gateway, tmp_path: Path, text: str, names: list[str]
) -> None:
    (tmp_path / "job.toml").write_text(text)
    result = keel("submit", str(tmp_path / "job.toml"))
    assert result.exit_code == 2
    assert all(name in result.complained for name in names)
    assert gateway.asked == []


def test_a_file_that_is_not_there(keel: Callable[..., Any]) -> None:
    result = keel("submit", "nowhere.toml")
    assert result.exit_code == 2
    assert "nowhere.toml" in result.complained


def test_each_fault_of_a_refusal_is_told(
    keel: Callable[..., Any], gateway: Gateway, file: str
) -> None:
    faults = [
        {"field": "recipe.replay", "value": "R3", "valid": "an engine with routes"},
        {"field": "engine.quantize", "value": "fp8", "valid": "none"},
    ]
    gateway.answers["POST", "/v1/jobs"] = (
        422,
        {"title": "The request is not valid", "detail": "...", "errors": faults},
    )
    result = keel("submit", file)
    assert result.exit_code == 2
    assert "recipe.replay: 'R3'; valid: an engine with routes" in result.complained
    assert "engine.quantize: 'fp8'; valid: none" in result.complained


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        ((503, {"detail": "Redis does not answer"}), 3),
        ((502, "<html>bad gateway</html>"), 3),
        ((500, "<html>oops</html>"), 1),
        ((409, {"title": "The state of the run forbids it", "detail": "it is over"}), 2),
    ],
)
def test_exit_status_says_whose_fault_it_is(
    keel: Callable[..., Any], gateway: Gateway, answer: Any, status: int
) -> None:
    gateway.answers["GET", "/v1/engines"] = answer
    assert keel("engines").exit_code == status


def test_no_gateway(keel: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    result = keel("jobs", "--url", "http://127.0.0.1:1")
    assert result.exit_code == 3
    assert "keel up" in result.complained
    assert "KEEL_URL" in result.complained


def test_an_url_that_is_none(keel: Callable[..., Any]) -> None:
    assert keel("jobs", "--url", "http://[::1").exit_code == 2


def test_jobs_are_listed_with_what_they_wait_for(
    keel: Callable[..., Any], gateway: Gateway
) -> None:
    gateway.jobs(
        job(reason="no engine is free"),
        job(run="second-ghijkl", phase=Phase.FAILED, step=4, error="[bold] broke"),
    )
    said = keel("jobs").said
    assert "no engine is free" in said
    assert "4/8" in said
    assert "[bold] broke" in said, "not read as markup"


def test_engines_are_listed_without_knowing_them(
    keel: Callable[..., Any], gateway: Gateway
) -> None:
    gateway.answers["GET", "/v1/engines"] = {"engines": [ENGINE | {"kind": None}]}
    said = keel("engines").said
    assert "a:1" in said
    assert "does not answer" in said


def test_engines_are_listed_with_what_they_are_to_their_job(
    keel: Callable[..., Any], gateway: Gateway
) -> None:
    said = {"healthy": True, "problem": "", "state": "READY", "run": "first-abcdef"}
    ready = ENGINE | said | {"run_state": "READY", "proved_version": 7}
    stale = {"address": "b:2", "run_state": "STALE", "stale": "median gap 0.3 [bold]nats"}
    gateway.answers["GET", "/v1/engines"] = {"engines": [ready, ready | stale]}
    _, first, second = keel("engines").said.splitlines()
    assert first.split() == ["a:1", "torch", "READY", "first-abcdef", "READY", "7"]
    assert second.split()[4:] == ["STALE", "7", "median", "gap", "0.3", "[bold]nats"]


def test_a_drain_waits_until_the_engine_is_empty(
    keel: Callable[..., Any], gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keel_gateway.cli_engines.POLL_S", 0.01)
    states = ["STALE", "DRAINING", "DRAINED"]
    gateway.answers["POST", "/v1/engines/a:1/drain"] = ENGINE | {"run_state": "DRAINING"}
    gateway.answers["GET", "/v1/engines"] = lambda: {
        "engines": [ENGINE | {"run_state": states.pop(0)}]
    }
    assert keel("engines", "drain", "a:1").said == "a:1 is DRAINING\n"
    assert keel("engines", "drain", "a:1", "--wait").said == "a:1 is DRAINED\n"
    assert states == []
    asked = [path for _, path, _ in gateway.asked if path.endswith("/drain")]
    assert len(asked) == 2, "waiting asks for nothing: an undrain by somebody else stands"
    states.append("READY")
    undrained = keel("engines", "drain", "a:1", "--wait")
    assert undrained.exit_code == 1
    assert "undrained meanwhile" in undrained.complained
    gateway.answers["POST", "/v1/engines/a:1/undrain"] = ENGINE
    assert keel("engines", "undrain", "a:1").said == "a:1 is FREE\n"
    refused = keel("engines", "drain", "[::1]:5")
    assert refused.exit_code == 2
    assert gateway.asked[-1][1] == "/v1/engines/%5B::1%5D:5/drain"


@pytest.mark.parametrize(
    ("text", "finds"),
    [
        ("latest", "second-bbb"),
        ("first-aaa", "first-aaa"),
        ("second-b", "second-bbb"),
        ("second-a", "second-aaa"),
    ],
)
def test_a_job_is_meant_by_id_prefix_or_latest(gateway: Gateway, text: str, finds: str) -> None:
    gateway.jobs(job(run="second-bbb"), job(run="second-aaa"), job(run="first-aaa"))
    with GatewayClient(gateway.url) as client:
        assert client.find(text).id == finds


@pytest.mark.parametrize("text", ["second", "third", ""])
def test_a_job_that_is_not_meant_clearly_is_refused(
    keel: Callable[..., Any], gateway: Gateway, text: str
) -> None:
    gateway.jobs(job(run="second-bbb"), job(run="second-aaa"), job(run="first-aaa"))
    result = keel("cancel", text)
    assert result.exit_code == 2
    assert "second-aaa" in result.complained
    assert not [asked for asked in gateway.asked if asked[0] == "POST"]


def test_cancel(keel: Callable[..., Any], gateway: Gateway) -> None:
    gateway.jobs(job(phase=Phase.TRAINING))
    cancelled = job(phase=Phase.TRAINING, desired="CANCELLED").model_dump(mode="json")
    gateway.answers["POST", "/v1/jobs/first-abcdef/cancel"] = cancelled
    assert "is stopping" in keel("cancel", "first").said


def test_pause_and_resume(keel: Callable[..., Any], gateway: Gateway) -> None:
    gateway.jobs(job(phase=Phase.TRAINING))
    path, trainer = "/v1/jobs/first-abcdef", {"phase": Phase.TRAINING, "trainer": "t:1"}
    for paused, said in ((False, "pauses before its next lap"), (True, "is paused")):
        state = job(desired=Desired.PAUSED, paused=paused, **trainer).model_dump(mode="json")
        gateway.answers["POST", f"{path}/pause"] = state
        assert said in keel("pause", "first").said
    gateway.answers["POST", f"{path}/resume"] = job(**trainer).model_dump(mode="json")
    assert "goes on" in keel("resume", "first").said
    assert json.loads(keel("resume", "first", "--json").said)["desired"] == "RUNNING"


def test_watch_shows_every_phase_and_ends_with_the_run(
    keel: Callable[..., Any], gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keel_gateway.cli.POLL_S", 0.0)
    gateway.jobs(job())
    views = iter(
        [
            job(reason="no engine is free"),
            job(phase=Phase.COLD_START, cold_start_step=3),
            job(phase=Phase.TRAINING, step=4),
            job(phase=Phase.SUCCEEDED, step=8),
        ]
    )
    gateway.answers["GET", "/v1/jobs/first-abcdef"] = lambda: next(views).model_dump(mode="json")
    gateway.answers["GET", "/v1/jobs/first-abcdef/metrics"] = {
        "rows": [row(step) for step in range(1, 9)],
        "evaluation": {"step": 8, "accuracy/eval": 0.625},
    }
    result = keel("watch", "latest")
    assert result.exit_code == 0
    lines = result.said.splitlines()
    assert [text.split()[1] for text in lines] == ["QUEUED", "COLD_START", "TRAINING", "SUCCEEDED"]
    assert "no engine is free" in lines[0]
    assert "supervised step 3/10" in lines[1]
    assert "4 s left" in lines[2], "four steps of one second"
    for part in (
        "step 8/8",
        "reward 0.450",
        "accuracy 0.625",
        "mismatch k3 1.00e-03",
        "staleness k3 2.00e-04",
        "clip high/low 1.00%/0.20%",
        "replay obeyed 100%",
        "tokens/s 100",
    ):
        assert part in lines[3]


@pytest.mark.parametrize(("phase", "status"), [(Phase.FAILED, 1), (Phase.CANCELLED, 4)])
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_watch_of_a_run_that_did_not_succeed(
    keel: Callable[..., Any], gateway: Gateway, phase: Phase, status: int, flags: list[str]
) -> None:
    gateway.jobs(job(phase=phase, error="the loss is not finite"))
    result = keel("watch", "first", *flags)
    assert result.exit_code == status
    assert "the loss is not finite" in result.said


def test_watch_survives_a_gateway_that_is_away_for_a_while(gateway: Gateway) -> None:
    answers = iter(
        [
            job(phase=Phase.TRAINING).model_dump(mode="json"),
            (503, {"detail": "Redis does not answer"}),
            job(phase=Phase.SUCCEEDED).model_dump(mode="json"),
        ]
    )
    gateway.jobs(job())
    gateway.answers["GET", "/v1/jobs/first-abcdef"] = lambda: next(answers)
    with GatewayClient(gateway.url) as client:
        views = list(follow(client, "first-abcdef", every_s=0))
    assert [bool(view.lost) for view in views] == [False, True, False]
    assert "Redis does not answer" in line(views[1])


def test_watch_does_not_wait_for_ever(gateway: Gateway) -> None:
    gateway.jobs(job(phase=Phase.TRAINING))
    with GatewayClient(gateway.url) as client:
        views = follow(client, "first-abcdef", every_s=0, patience_s=0)
        next(views)
        gateway.answers["GET", "/v1/jobs/first-abcdef"] = (503, {"detail": "away"})
        with pytest.raises(Unreachable):
            next(views)


def test_rows_are_read_page_by_page(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "ROWS_PER_PAGE", 2)
    pages = iter([[row(1), row(2)], [row(3)]])
    gateway.answers["GET", "/v1/jobs/a/metrics"] = lambda: {"rows": next(pages), "evaluation": None}
    with GatewayClient(gateway.url) as gateway_client:
        rows = gateway_client.metrics("a").rows
    assert [one["step"] for one in rows] == [1, 2, 3]
    assert [path.split("?")[1] for _, path, _ in gateway.asked] == [
        "after=-1&limit=2",
        "after=2&limit=2",
    ]


def test_live_panel_shows_progress_and_numbers() -> None:
    console = Console(width=100, file=io.StringIO(), force_terminal=True, color_system=None)
    view = View(job(phase=Phase.TRAINING, step=4), [row(step) for step in range(1, 5)], 12.0)
    assert watch([view], console).phase is Phase.TRAINING
    said = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("first-abcdef", "TRAINING step 4/8", "12 s left", "reward 0.250", "0.10 to 0.40"):
        assert part in said
    console.print(panel(View(job(), [], None, lost="no gateway answers")))
    assert "no gateway answers" in console.file.getvalue()  # type: ignore[attr-defined]


def test_replay_that_was_not_obeyed_stands_out() -> None:
    rows = [row(1), row(2, **{"replay/rows_obeyed": 49})]
    assert dict(numbers(rows, rows))["replay obeyed"] == "ONLY 99.0000%"


def test_columns_that_are_missing_are_left_out() -> None:
    assert numbers([], []) == []
    assert numbers([{"step": 1, "entropy": None}], [{"step": 1, "entropy": None}]) == []


def test_curve() -> None:
    assert curve([0.0, 0.5, 1.0]) == "▁▅█  0.00 to 1.00"
    assert curve([0.5, 0.5]) == "▁▁  0.50 to 0.50"
    assert len(curve([float(i) for i in range(1000)]).split()[0]) == 40


def test_url_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KEEL_URL", raising=False)
    assert find_url(None) == "http://127.0.0.1:8080"
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "stack.json").write_text('{"url": "http://127.0.0.1:9000"}')
    assert find_url(None) == "http://127.0.0.1:9000"
    monkeypatch.setenv("KEEL_URL", "http://b:1")
    assert find_url(None) == "http://b:1"
    assert find_url("http://a:1") == "http://a:1"


def added(name: str) -> None:
    """Added by another distribution."""
    cli_group.out.print(f"added {name}")


more = typer.Typer(help="More of them.")
more.command()(added)
more.command("again")(added)


@pytest.mark.parametrize(
    ("value", "arguments"),
    [("added", ["extra", "x"]), ("more", ["extra", "again", "x"])],
    ids=["function", "typer"],
)
def test_other_distributions_add_commands(
    keel: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, value: str, arguments: list[str]
) -> None:
    entry = EntryPoint("extra", f"{__name__}:{value}", cli_group.GROUP)
    monkeypatch.setattr(EntryPoint, "load", lambda self: globals()[self.attr])
    monkeypatch.setattr(cli_group, "entry_points", lambda group: [entry])
    assert "extra" in keel("--help").said
    result = keel(*arguments)
    assert result.exit_code == 0
    assert "added x" in result.said


def test_a_broken_addition_does_not_take_keel_away(
    keel: Callable[..., Any], gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = EntryPoint("broken", "no_such_module:app", cli_group.GROUP)
    monkeypatch.setattr(cli_group, "entry_points", lambda group: [entry])
    gateway.jobs()
    assert keel("jobs").exit_code == 0
    assert keel("--help").exit_code == 0
    result = keel("broken")
    assert result.exit_code == 2
    assert "no_such_module" in result.complained


def test_json_of_every_command_is_the_rest_interface_s(
    keel: Callable[..., Any], gateway: Gateway, file: str
) -> None:
    """One document on stdout, nothing on stderr."""
    body = job(reason="no engine is free").model_dump(mode="json")
    gateway.jobs(job(reason="no engine is free"))
    gateway.answers["POST", "/v1/jobs"] = (201, body)
    gateway.answers["POST", "/v1/jobs/first-abcdef/cancel"] = body
    gateway.answers["GET", "/v1/engines"] = {"engines": [ENGINE]}
    gateway.answers["POST", "/v1/engines/a:1/drain"] = ENGINE | {"run_state": "DRAINING"}
    gateway.answers["POST", "/v1/engines/a:1/undrain"] = ENGINE
    for arguments, expected in (
        (("jobs",), {"jobs": [body]}),
        (("engines",), {"engines": [ENGINE]}),
        (("engines", "drain", "a:1"), ENGINE | {"run_state": "DRAINING"}),
        (("engines", "undrain", "a:1"), ENGINE),
        (("submit", file), body),
        (("cancel", "first"), body),
    ):
        result = keel(*arguments, "--json")
        assert json.loads(result.stdout) == expected
        assert (result.exit_code, result.stderr) == (0, "")


def test_json_lines_of_watch_tell_each_change_once(
    keel: Callable[..., Any], gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keel_gateway.cli.POLL_S", 0.0)
    gateway.jobs(job())
    views = iter(
        [
            job(reason="no engine is free").model_dump(mode="json"),
            job(reason="no engine is free").model_dump(mode="json"),
            job(phase=Phase.TRAINING, step=1).model_dump(mode="json"),
            (503, {"detail": "Redis does not answer"}),
            (503, {"detail": "Redis does not answer"}),
            job(phase=Phase.TRAINING, step=2).model_dump(mode="json"),
            job(phase=Phase.SUCCEEDED, step=2).model_dump(mode="json"),
        ]
    )
    metrics = iter(
        [
            {"rows": [], "evaluation": None},
            {"rows": [], "evaluation": None},
            {"rows": [row(1)], "evaluation": None},
            {"rows": [row(1), row(2)], "evaluation": None},
            {"rows": [row(1), row(2)], "evaluation": {"step": 2, "accuracy/eval": 0.5}},
        ]
    )
    gateway.answers["GET", "/v1/jobs/first-abcdef"] = lambda: next(views)
    gateway.answers["GET", "/v1/jobs/first-abcdef/metrics"] = lambda: next(metrics)
    result = keel("watch", "first", "--json")
    assert result.stderr == ""
    events = [json.loads(line) for line in result.stdout.splitlines()]
    told = [
        event["job"]["phase"] if event["event"] == "job" else event.get("row", {}).get("step")
        for event in events
    ]
    assert told == ["QUEUED", 1, "TRAINING", None, 2, 2, "SUCCEEDED"]
    assert "Redis does not answer" in events[3]["detail"]
    assert [event["row"].get("accuracy/eval") for event in events[4:6]] == [None, 0.5]
    assert events[1]["row"] == row(1)


@pytest.mark.parametrize(
    ("arguments", "answer", "status", "kind", "says"),
    [
        (("jobs", "--limit", "x"), None, 2, "invalid", "--limit"),
        (("cancel",), None, 2, "invalid", "JOB"),
        (("no-such-command",), None, 2, "invalid", "no-such-command"),
        (("cancel", "other"), None, 2, "invalid", "first-abcdef"),
        (("engines",), (503, {"detail": "Redis does not answer"}), 3, "unavailable", "Redis"),
        (("engines",), (500, {"title": "A fault", "detail": "oops"}), 1, "failed", "oops"),
    ],
)
def test_errors_are_one_json_problem_on_stderr(
    keel: Callable[..., Any],
    gateway: Gateway,
    arguments: tuple[str, ...],
    answer: Any,
    status: int,
    kind: str,
    says: str,
) -> None:
    gateway.jobs(job())
    if answer:
        gateway.answers["GET", "/v1/engines"] = answer
    result = keel(*arguments, "--json")
    assert (result.exit_code, result.stdout) == (status, "")
    problem = json.loads(result.stderr)
    assert problem["type"] == f"urn:keel:problem:{kind}"
    assert problem["exit_status"] == status
    assert says in problem["detail"]


def test_a_json_problem_has_every_fault(
    keel: Callable[..., Any], gateway: Gateway, tmp_path: Path, file: str
) -> None:
    path = tmp_path / "two.toml"
    path.write_text(TOML.replace("steps = 8", "steps = 9").replace("name = ", "seed = -1\nname = "))
    problem = json.loads(keel("submit", str(path), "--json").stderr)
    assert {fault["field"] for fault in problem["errors"]} == {"seed", "recipe.steps"}
    assert problem["errors"][0]["value"] in (-1, 9)
    refusal = {"field": "engine.quantize", "value": "fp8", "valid": "none"}
    body = {"title": "The request is not valid", "detail": "...", "errors": [refusal]}
    gateway.answers["POST", "/v1/jobs"] = (422, body)
    problem = json.loads(keel("submit", file, "--json").stderr)
    assert problem["errors"] == [refusal]
    assert problem["status"] == 422


def test_the_help_page_has_every_exit_status(keel: Callable[..., Any]) -> None:
    text = " ".join(keel("--help").stdout.split())
    for code, meaning in cli_group.EXIT_STATUSES.items():
        assert f"{code} {meaning}" in text


def complete(words: str, url: str) -> list[str]:
    """What bash offers after these words."""
    done = subprocess.run(
        [Path(sys.executable).with_name("keel")],
        env=os.environ
        | {
            "_KEEL_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split()) - 1 + words.endswith(" ")),
            "KEEL_URL": url,
        },
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_job_ids_complete(gateway: Gateway) -> None:
    gateway.jobs(job(run="second-bbb"), job(run="second-aaa"), job(run="first-aaa"))
    assert complete("keel watch sec", gateway.url) == ["second-bbb", "second-aaa"]
    assert complete("keel cancel ", gateway.url)[0] == "latest"
    assert "watch" in complete("keel w", gateway.url)


def test_completion_without_a_gateway_is_silent_and_quick() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:  # takes connections, never answers
        began = time.monotonic()
        assert complete("keel watch f", f"http://127.0.0.1:{mute.getsockname()[1]}") == []
        assert time.monotonic() - began < 5.0
    assert complete("keel watch f", "http://127.0.0.1:1") == []
    assert complete("keel watch f", "http://[::1") == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_watch_that_is_interrupted_exits_130_and_says_that_the_job_goes_on(
    gateway: Gateway, number: signal.Signals, flags: list[str]
) -> None:
    gateway.jobs(job(phase=Phase.TRAINING))
    with subprocess.Popen(
        [Path(sys.executable).with_name("keel"), "watch", "--url", gateway.url, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # tests that run in the background of a shell ignore Ctrl-C, and so would what they start
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # noqa: PLW1509
    ) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        process.send_signal(number)
        try:
            rest, complaint = process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert process.returncode == 130
    assert "TRAINING" in first
    assert "keel cancel first-abcdef" in (complaint if flags else rest)
    assert (rest == "") == bool(flags), "with --json stdout has events alone"
