"""`keel doctor` on this machine, and on one where something is wrong."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from clikit import ENGINE, Gateway

from keel_gateway import doctor
from keel_gateway.installed import lacks, untested

pytest_plugins = ["cli_fixtures"]


@pytest.fixture
def found(keel: Callable[..., Any], gateway: Gateway) -> Callable[..., dict[str, Any]]:
    """Runs `keel doctor --json`: the checks by name, "ok" and "status" beside them."""

    def look(*flags: str) -> dict[str, Any]:
        result = keel("doctor", "--json", *flags)
        said = json.loads(result.stdout)
        assert all(bool(check["remedy"]) != (check["state"] == "ok") for check in said["checks"])
        by_name = {check["name"]: check for check in said["checks"]}
        return by_name | {"ok": said["ok"], "status": result.exit_code}

    return look


@pytest.fixture
def healthy(gateway: Gateway) -> Gateway:
    """A gateway that is ready."""
    gateway.answers["GET", "/healthz"] = gateway.answers["GET", "/readyz"] = {"status": "ok"}
    engine = ENGINE | {"healthy": True, "problem": "", "state": "EMPTY"}
    gateway.answers["GET", "/v1/engines"] = {"engines": [engine]}
    return gateway


@pytest.fixture
def no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the seconds that torch takes; the first test has them."""
    monkeypatch.setattr(doctor, "_torch", lambda device: iter(()))


def test_this_machine_can_run(found: Callable[..., dict[str, Any]], healthy: Gateway) -> None:
    said = found()
    assert (said["ok"], said["status"]) == (True, 0)
    assert said["device"]["found"].startswith("cpu")
    assert "preset:tiny-qwen3-moe" in said["model"]["found"]
    assert "Redis server v=" in said["redis"]["found"]
    assert said["engine"]["found"] == "a:1 empty"
    assert said["clock"]["state"] == "ok"


def test_a_device_that_is_not_there(found: Callable[..., dict[str, Any]], healthy: Gateway) -> None:
    said = found("--device", "cuda:99")
    assert (said["ok"], said["status"]) == (False, 1)
    assert said["device"]["state"] == "fail"
    assert "model" not in said, "it could not be tried"


def test_a_gateway_that_is_not_ready(
    found: Callable[..., dict[str, Any]], healthy: Gateway, no_probe: None
) -> None:
    healthy.answers["GET", "/readyz"] = (503, {"detail": "no trainer is healthy: b:1 is away"})
    said = found()
    assert said["status"] == 1
    assert "no trainer is healthy: b:1 is away" in said["gateway"]["found"]


def test_metrics_of_the_stack_in_this_folder_are_told_and_tried(
    keel: Callable[..., Any],
    healthy: Gateway,
    no_probe: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    metrics = {"engine-0": f"{healthy.url}/metrics", "trainer": "http://127.0.0.1:1/metrics"}
    state = {"url": healthy.url, "metrics": metrics}
    (tmp_path / "runs" / "stack.json").write_text(json.dumps(state))
    healthy.answers["GET", "/metrics"] = "keel_engine_tokens_total 1.0"
    result = keel("doctor", "--json")
    told = [c for c in json.loads(result.stdout)["checks"] if c["name"] == "metrics"]
    assert [check["state"] for check in told] == ["ok", "warn"]
    assert told[0]["found"] == f"engine-0 {healthy.url}/metrics"
    assert "runs/logs/trainer.log" in told[1]["remedy"]
    assert result.exit_code == 0, "a run works without"


def test_an_engine_that_is_away_beside_one_that_is_not_is_a_warning(
    found: Callable[..., dict[str, Any]], healthy: Gateway, no_probe: None
) -> None:
    away = ENGINE | {"healthy": False, "problem": "does not answer", "state": None}
    healthy.answers["GET", "/v1/engines"] = {"engines": [away]}
    said = found()
    assert said["engine"]["state"] == "warn"
    assert said["engine"]["found"] == "a:1 does not answer"
    assert said["status"] == 0


def test_redis_that_has_lost_its_data_is_told(
    found: Callable[..., dict[str, Any]], healthy: Gateway, no_probe: None
) -> None:
    note = "Redis was restarted without its data at about 14:03 UTC: 1 job is lost"
    healthy.answers["GET", "/readyz"] = {"status": "ok", "notes": [note]}
    said = found()
    assert said["gateway"]["state"] == "ok"
    assert (said["redis data"]["state"], said["redis data"]["found"]) == ("warn", note)


def test_no_gateway_is_no_fault(found: Callable[..., dict[str, Any]], no_probe: None) -> None:
    said = found("--url", "http://127.0.0.1:1")
    assert said["gateway"]["state"] == "warn"
    assert "keel up" in said["gateway"]["remedy"]
    assert said["status"] == 0


def test_something_else_than_a_gateway(
    found: Callable[..., dict[str, Any]], gateway: Gateway, no_probe: None
) -> None:
    assert found()["gateway"]["state"] == "fail", "404 for /healthz"


def test_a_folder_that_cannot_be_written(
    found: Callable[..., dict[str, Any]], healthy: Gateway, no_probe: None
) -> None:
    said = found("--dir", "/proc/here")
    assert said["folder"]["state"] == "fail"
    assert "/proc" in said["folder"]["found"]
    assert said["status"] == 1


def test_a_taken_port(
    found: Callable[..., dict[str, Any]],
    healthy: Gateway,
    no_probe: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        monkeypatch.setattr(doctor, "GATEWAY_PORT", port)
        said = found()
        assert said["ports"]["state"] == "warn"
        assert str(port) in said["ports"]["found"]
        assert "--port" in said["ports"]["remedy"]


@pytest.mark.parametrize("state", ["warn", "fail"])
def test_too_little_memory_and_disk(
    found: Callable[..., dict[str, Any]],
    healthy: Gateway,
    no_probe: None,
    monkeypatch: pytest.MonkeyPatch,
    state: str,
) -> None:
    """The limits are raised, since the machine's memory cannot be lowered."""
    for name in ("DISK", "MEMORY"):
        monkeypatch.setattr(doctor, f"GOOD_{name}_BYTES", 2**60)
        if state == "fail":
            monkeypatch.setattr(doctor, f"LEAST_{name}_BYTES", 2**60)
    said = found()
    assert said["disk"]["state"] == said["memory"]["state"] == state
    assert said["status"] == (1 if state == "fail" else 0)


def test_a_clock_that_is_wrong(
    found: Callable[..., dict[str, Any]],
    healthy: Gateway,
    no_probe: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "CLOCK_SKEW_S", -1.0)
    assert found()["clock"]["state"] == "warn"


def test_what_a_distribution_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "asking-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: asking\nVersion: 1.0\nRequires-Dist: numpy<1\n"
        "Requires-Dist: redis>=5\nRequires-Dist: not-there>=2\n"
        'Requires-Dist: numpy>=99; extra == "more"\n'
        'Requires-Dist: not-there-either; python_version < "3"\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    numpy = __import__("numpy").__version__
    assert lacks("asking") == [f"numpy<1 ({numpy} is installed)", "not-there>=2 (not installed)"]
    assert lacks("asking[more]")[-1] == f"numpy>=99 ({numpy} is installed)"
    assert lacks("nothing-of-this-name") == ["nothing-of-this-name (not installed)"]
    assert lacks("keel-rollout[torch]") == []


def test_versions_other_than_tested(tmp_path: Path) -> None:
    file = tmp_path / "constraints.txt"
    numpy = __import__("numpy").__version__
    file.write_text(f"# tested\nnumpy=={numpy}  # same\nredis==0.1\nnot-there==1\ntorch>=2\n")
    (different,) = untested(file) or []
    assert different.startswith("redis ")
    assert different.endswith("(tested: 0.1)")
    assert untested(tmp_path / "none.txt") is None
