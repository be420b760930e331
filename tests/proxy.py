"""A TCP proxy that holds bytes back, or is cut: the network that a test wants."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from types import TracebackType


class Proxy:
    """Listens on a free loopback port and forwards both ways, late.

    Example:
        with Proxy("127.0.0.1:6379", seed=1, chance=0.3) as proxy:
            client = redis.Redis.from_url(f"redis://{proxy.address}")
    """

    def __init__(
        self, target: str, *, seed: int, chance: float = 0.0, longest_s: float = 0.05
    ) -> None:
        """
        Args:
            target: "host:port".
            chance: share of chunks that are held back.
            longest_s: delays are uniform up to this.
        """
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._random = random.Random(seed)
        self._chance, self._longest_s = chance, longest_s
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._open: set[asyncio.StreamWriter] = set()
        self._cut = False
        self.address = ""
        self.delayed = 0
        """Chunks held back so far."""

    def __enter__(self) -> Proxy:
        self._thread.start()
        start = asyncio.start_server(self._serve, "127.0.0.1", 0)
        server = asyncio.run_coroutine_threadsafe(start, self._loop).result()
        host, port = server.sockets[0].getsockname()
        self.address = f"{host}:{port}"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._cancel(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def cut(self, seconds: float) -> None:
        """Resets every connection and refuses new ones for a while; returns after it."""
        self._loop.call_soon_threadsafe(self._set_cut, True)
        time.sleep(seconds)
        self._loop.call_soon_threadsafe(self._set_cut, False)

    def _set_cut(self, cut: bool) -> None:
        self._cut = cut
        if cut:
            for writer in self._open:
                writer.transport.abort()

    async def _cancel(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if self._cut:
                raise ConnectionRefusedError
            far_reader, far_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        self._open |= {writer, far_writer}
        try:
            await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))
        finally:
            self._open -= {writer, far_writer}

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while chunk := await reader.read(65536):
                if self._random.random() < self._chance:
                    self.delayed += 1
                    await asyncio.sleep(self._random.uniform(0, self._longest_s))
                writer.write(chunk)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()
