"""A page of docs as something to run: its code blocks in order, as they stand."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(
    r'^```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<text>.*?)^```$',
    re.MULTILINE | re.DOTALL,
)
READ_ONLY = ("console", "text")
BACKGROUND = "terminal 1"


@dataclass(frozen=True)
class Block:
    """One fenced block. With the title "terminal 1" a service, with any other title a file."""

    language: str
    title: str
    text: str
    line: int


def blocks(page: str) -> list[Block]:
    """Every block of a page. ValueError: a fence that is none of the kinds that this file knows."""
    found = [
        Block(m["language"], m["title"] or "", m["text"], page[: m.start()].count("\n") + 1)
        for m in _BLOCK.finditer(page)
    ]
    if 2 * len(found) != len(re.findall(r"^ *```", page, re.MULTILINE)):
        raise ValueError('a fence that is not ```language or ```language title="..."')
    for block in found:
        runs = block.language in ("bash", "python") or block.title
        if not runs and block.language not in READ_ONLY:
            raise ValueError(f"line {block.line}: is {block.language} to be run, saved or read?")
    return found


class Terminals:
    """Runs blocks in a folder, as a reader would who has activated the environment."""

    def __init__(self, folder: Path, env: Mapping[str, str], timeout_s: float) -> None:
        self.folder, self.timeout_s = folder, timeout_s
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.env = {**os.environ, **env, "PATH": path}
        self.services: list[subprocess.Popen[bytes]] = []

    def run(self, block: Block) -> None:
        """Does what the block says. AssertionError: it failed."""
        if block.language in READ_ONLY:
            return
        if block.title == BACKGROUND:
            self._start(block)
        elif block.title:
            (self.folder / block.title).write_text(block.text, encoding="utf-8")
        else:
            self._foreground(block)

    def _foreground(self, block: Block) -> None:
        command = ["bash", "-euo", "pipefail"] if block.language == "bash" else ["python", "-"]
        done = subprocess.run(
            command,
            input=block.text,
            capture_output=True,
            text=True,
            cwd=self.folder,
            env=self.env,
            timeout=self.timeout_s,
        )
        said = done.stdout[-4000:] + done.stderr[-4000:]
        assert done.returncode == 0, f"line {block.line}: {block.text}{said}"

    def _start(self, block: Block) -> None:
        """Runs it in the background, and goes on when it says that it is up."""
        log = self.folder / f"terminal-{len(self.services)}.log"
        with log.open("wb") as out:
            service = subprocess.Popen(
                ["bash", "-c", f"exec {block.text}"],
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env=self.env,
            )
        self.services.append(service)
        deadline = time.monotonic() + self.timeout_s
        while " is up at " not in (said := log.read_text(encoding="utf-8")):
            assert service.poll() is None, f"line {block.line} ended: {said}"
            assert time.monotonic() < deadline, f"line {block.line} is not up: {said}"
            time.sleep(0.1)

    def close(self) -> None:
        """Ctrl-C in every terminal that still runs something."""
        for service in self.services:
            service.send_signal(signal.SIGINT)
        for service in self.services:
            service.wait(timeout=60)
