"""Processes kept running: order, restart, orderly stop, and no orphans. Real, tiny processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from keel.errors import InvalidField
from keel_gateway import supervisor as module
from keel_gateway.stack import Stack
from keel_gateway.stack_folder import free_port, lock_folder, remembered_ports
from keel_gateway.supervisor import Service, StackError, Supervisor

# writes its pid and that of a child which ignores SIGTERM, says when it is told to stop
_SERVICE = """
import os, pathlib, signal, subprocess, sys, time
name, folder = sys.argv[1], pathlib.Path(sys.argv[2])
def stop(*_):
    with (folder / "order").open("a") as file: file.write(name + "\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-S", "-c", stubborn])
(folder / (name + ".pids.new")).write_text(f"{os.getpid()} {child.pid}")
(folder / (name + ".pids.new")).rename(folder / (name + ".pids"))
print("up", os.environ.get("COLOUR"), flush=True)
time.sleep(60)
"""


def service(name: str, folder: Path, **env: str) -> Service:
    pids = folder / f"{name}.pids"
    return Service(
        name,
        [sys.executable, "-S", "-c", _SERVICE, name, str(folder)],
        env,
        lambda: "" if pids.exists() else "no pids yet",
    )


def pids(folder: Path, name: str) -> list[int]:
    return [int(pid) for pid in (folder / f"{name}.pids").read_text().split()]


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def wait_for(true: Callable[[], bool], within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, "not within time"
        time.sleep(0.02)


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Supervisor]:
    running = Supervisor(
        [service("first", tmp_path, COLOUR="blue"), service("second", tmp_path)], tmp_path / "logs"
    )
    running.start(patience_s=20)
    yield running
    running.stop()


def test_stops_in_reverse_and_leaves_nothing(two: Supervisor, tmp_path: Path) -> None:
    everyone = pids(tmp_path, "first") + pids(tmp_path, "second")
    assert all(map(alive, everyone))
    two.stop()
    assert (tmp_path / "order").read_text().split() == ["second", "first"]
    assert not any(map(alive, everyone)), "also children that ignore SIGTERM"


def test_output_and_environment_reach_the_process(two: Supervisor, tmp_path: Path) -> None:
    wait_for(lambda: "up blue" in two.log_file("first").read_text())
    assert two.log_file("first") == tmp_path / "logs" / "first.log"


def test_the_dead_are_restarted_without_what_they_had_started(
    two: Supervisor, tmp_path: Path
) -> None:
    before = pids(tmp_path, "first")
    os.kill(before[0], signal.SIGKILL)
    wait_for(lambda: pids(tmp_path, "first") != before)
    after = pids(tmp_path, "first")
    assert not set(before) & set(after)
    assert not any(map(alive, before)), "an orphan would work against its successor"
    assert two.pid("first") == after[0]
    assert alive(pids(tmp_path, "second")[0]), "the others are left alone"


def test_delay_grows_with_each_death(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_DELAY_S", 0.2)
    dies = f"open({str(tmp_path / 'starts')!r}, 'a').write(f'{{__import__(\"time\").time()}}\\n')"
    running = Supervisor([Service("dies", [sys.executable, "-S", "-c", dies])], tmp_path / "logs")
    running.start()
    try:
        wait_for((tmp_path / "starts").exists)
        wait_for(lambda: len((tmp_path / "starts").read_text().split()) >= 4)
    finally:
        running.stop()
    times = [float(text) for text in (tmp_path / "starts").read_text().split()]
    waits = [after - before for before, after in pairwise(times[:4])]
    assert waits[0] >= 0.2
    assert waits[1] >= 0.4
    assert waits[2] >= 0.8


def test_one_that_never_comes_up_ends_the_start_with_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FIRST_DELAY_S", 0.05)
    broken = Service(
        "broken",
        [sys.executable, "-S", "-c", "raise SystemExit('no such model')"],
        ready=lambda: "does not answer",
    )
    running = Supervisor([service("first", tmp_path), broken], tmp_path / "logs")
    try:
        with pytest.raises(StackError, match=r"(?s)broken dies whenever.*no such model"):
            running.start(patience_s=30)
    finally:
        running.stop()
    assert not any(map(alive, pids(tmp_path, "first")))


def test_patience_ends(tmp_path: Path) -> None:
    mute = Service("mute", [sys.executable, "-S", "-c", "input()"], ready=lambda: "says nothing")
    sleeper = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
    running = Supervisor([Service(mute.name, sleeper, ready=mute.ready)], tmp_path / "logs")
    try:
        with pytest.raises(StackError, match="mute is not ready: says nothing"):
            running.start(patience_s=0.3)
    finally:
        running.stop()


def test_no_orphans_when_the_parent_is_killed(tmp_path: Path) -> None:
    script = f"""
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from keel_gateway.supervisor import Supervisor
        from test_stack_supervisor import service
        folder = Path({str(tmp_path)!r})
        Supervisor([service("only", folder)], folder / "logs").start(patience_s=20)
        (folder / "started").touch()
        time.sleep(60)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])
    try:
        wait_for((tmp_path / "started").exists, 30)
        everyone = pids(tmp_path, "only")
        assert all(map(alive, everyone))
    finally:
        parent.kill()
        parent.wait()
    # SIGTERM at once for those who listen; SIGKILL after five seconds for the child who does not
    wait_for(lambda: not any(map(alive, everyone)), 15)
    assert (tmp_path / "order").read_text() == "only\n", "it was asked before it was made to"


def test_two_stacks_cannot_share_a_folder(tmp_path: Path) -> None:
    with (
        lock_folder(tmp_path, "--dir"),
        pytest.raises(InvalidField, match=r"--dir: .* no running stack uses"),
        Stack(tmp_path),
    ):
        pass
    lock_folder(tmp_path, "--dir").close()


def test_a_taken_port_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidField, match=f"--port: {port}"), Stack(tmp_path, port=port):
            pass
    assert not list((tmp_path).glob("logs/*"))
    lock_folder(tmp_path, "--dir").close()


def test_free_ports_are_below_those_of_outgoing_connections() -> None:
    ports = {free_port(set()) for _ in range(20)}
    assert all(20000 <= port < 30000 for port in ports)
    assert len(ports) > 1


def test_the_gateways_port_is_taken_from_a_service_that_had_it(tmp_path: Path) -> None:
    before = Stack(tmp_path)
    before.dir.mkdir(exist_ok=True)
    before._services()
    asked = before.ports["trainer"]
    after = Stack(tmp_path, port=asked)
    after._services()
    assert after.ports["gateway"] == asked != after.ports["trainer"]
    assert after.ports["engine-0"] == before.ports["engine-0"]


def test_services_keep_their_ports_because_leases_name_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "ports.json"
    assert remembered_ports(file) == {}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = free_port(set())
        file.write_text(json.dumps({"trainer": free, "engine-0": taken.getsockname()[1]}))
        assert remembered_ports(file) == {"trainer": free}
    assert "engine-0 is taken" in caplog.text
