"""`keel` against a small HTTP server that answers as the gateway does."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from keel.record import Phase, RunRecord
from keel.spec import parse_spec
from keel_gateway import cli_group, client
from keel_gateway.cli import app
from keel_gateway.client import GatewayClient, Unreachable, find_url
from keel_gateway.follow import View, follow
from keel_gateway.schemas import Job
from keel_gateway.watch import curve, line, numbers, panel, watch

SPEC = {
    "name": "first",
    "model": {"path": "preset:tiny-qwen3-moe"},
    "cold_start": {"steps": 10},
    "recipe": {"steps": 8, "off_policiness": 4},
}
TOML = """
name = "first"
[model]
path = "preset:tiny-qwen3-moe"
[recipe]
steps = 8
off_policiness = 4
"""
RECORD = RunRecord("first-abcdef", parse_spec(SPEC), created_s=1_700_000_000.0)


def job(reason: str = "", **changes: Any) -> Job:
    return Job.from_record(replace(RECORD, **changes), reason)


def row(step: int, **columns: float) -> dict[str, Any]:
    return {
        "step": step,
        "lap": (step - 1) // 4,
        "reward/mean": step / 10,
        "mismatch/k3": 1e-3,
        "staleness/k3": 2e-4,
        "clip/high": 0.01,
        "clip/low": 0.002,
        "replay/rows_requested": 50,
        "replay/rows_obeyed": 50,
        "tokens/response": 100,
        "time/update_s": 0.5,
        "time/wait_s": 0.5,
    } | columns


class Gateway:
    """Answers by (method, path); an answer may be a function of nothing, to change over time."""

    def __init__(self) -> None:
        self.answers: dict[tuple[str, str], Any] = {}
        self.asked: list[tuple[str, str, Any]] = []
        self.url = ""

    def jobs(self, *found: Job) -> None:
        self.answers["GET", "/v1/jobs"] = {"jobs": [j.model_dump(mode="json") for j in found]}
        for one in found:
            self.answers["GET", f"/v1/jobs/{one.id}"] = one.model_dump(mode="json")
            self.answers["GET", f"/v1/jobs/{one.id}/metrics"] = {"rows": [], "evaluation": None}

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        bare = path.partition("?")[0]
        self.asked.append((method, path, body))
        found = self.answers.get((method, bare), (404, {"title": "no", "detail": bare}))
        found = found() if callable(found) else found
        return found if isinstance(found, tuple) else (200, found)


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    served = Gateway()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            length = int(self.headers.get("content-length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            status, answer = served.answer(self.command, self.path, body)
            data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("KEEL_URL", served.url)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield served
    server.shutdown()
    server.server_close()


@pytest.fixture
def keel(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    def invoke(*arguments: str) -> Any:
        monkeypatch.setattr(cli_group, "out", console := Console(width=200, file=io.StringIO()))
        monkeypatch.setattr("keel_gateway.cli.out", console)
        monkeypatch.setattr(
            cli_group, "err", errors := Console(width=200, file=io.StringIO(), highlight=False)
        )
        result = CliRunner().invoke(app, arguments)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        result.said = console.file.getvalue() + result.output
        result.complained = errors.file.getvalue() + result.output
        return result

    return invoke


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "job.toml"
    path.write_text(TOML)
    return str(path)


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
    engine = {"address": "a:1", "healthy": False, "problem": "does not answer"}
    unknown = dict.fromkeys(("kind", "state", "capabilities", "last_seen_at", "run"))
    gateway.answers["GET", "/v1/engines"] = {"engines": [engine | unknown]}
    said = keel("engines").said
    assert "a:1" in said
    assert "does not answer" in said


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


@pytest.mark.parametrize("phase", [Phase.FAILED, Phase.CANCELLED])
def test_watch_of_a_run_that_did_not_succeed_exits_1(
    keel: Callable[..., Any], gateway: Gateway, phase: Phase
) -> None:
    gateway.jobs(job(phase=phase, error="the loss is not finite"))
    result = keel("watch", "first")
    assert result.exit_code == 1
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


def test_report_is_written(keel: Callable[..., Any], gateway: Gateway, tmp_path: Path) -> None:
    gateway.jobs(job(phase=Phase.SUCCEEDED, step=8))
    gateway.answers["GET", "/v1/jobs/first-abcdef/metrics"] = {
        "rows": [row(step) for step in range(1, 9)],
        "evaluation": None,
    }
    assert keel("report", "first", "--out", str(tmp_path / "r.html")).exit_code == 0
    assert "mismatch/k3" in (tmp_path / "r.html").read_text()


def test_a_report_that_cannot_be_written_is_told_in_a_sentence(
    keel: Callable[..., Any], gateway: Gateway, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "report.html"  # under a file, so that root cannot write it either
    gateway.jobs(job())
    result = keel("report", "--out", str(path))
    assert result.exit_code == 2
    assert result.complained.strip().endswith(("Not a directory", "File exists"))


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
