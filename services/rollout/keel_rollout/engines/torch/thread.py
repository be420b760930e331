"""A thread that owns something: others hand it commands, which it carries out between turns."""

from __future__ import annotations

import logging
import os
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

log = logging.getLogger(__name__)


class CommandThread(threading.Thread, ABC):
    """Runs `work`, which carries out commands by `obey` in the order in which they came."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Has the thread call `function` at its next `obey`. Callable from any thread."""
        future: Future[Any] = Future()

        def command() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        self._commands.put(command)
        return future

    def post(self, function: Callable[[], None]) -> None:
        """As `call`, with nobody waiting."""
        self._commands.put(function)

    def obey(self, *, block: bool) -> None:
        """Carries out the commands that are there; with `block`, waits for at least one."""
        while block or not self._commands.empty():
            self._commands.get()()
            block = False

    def run(self) -> None:
        """The thread's body. A bug here ends the process, so that no deaf engine looks healthy."""
        try:
            self.work()
        except BaseException:
            log.critical("the thread %s died; so does the process", self.name, exc_info=True)
            logging.shutdown()
            os._exit(1)

    @abstractmethod
    def work(self) -> None:
        """What the thread does until it is done."""
