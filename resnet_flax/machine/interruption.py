"""Ctrl-C and SIGTERM: an orderly stop where there is something to save, a quick one elsewhere."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Python handles a signal only between two of its own instructions; a compilation may keep it from
# them for a minute.
SECONDS_TO_UNWIND = 3.0  # nothing is lost
SECONDS_TO_SAVE = 30.0  # in training there is a step to finish, and its result to save


class Interrupted(BaseException):
    """The run was asked to stop; ``saved`` says in words what was reached and saved, or nothing."""

    def __init__(self, signum: int, saved: str = "") -> None:
        super().__init__(signum, saved)
        self.signum, self.saved = signum, saved


class Interruption:
    """Watches for the signals, in a ``with`` statement; in the main thread, others get none.

    Outside `deferred` and `postponed`, a signal raises `Interrupted` at once. Inside `deferred`, it
    sets `requested`, and the training loop stops at the next step. A second signal ends the process
    on the spot, and so does the first when neither happens in time.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._deferred = False
        self._watching = False

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._watching = True
        self._handlers = {each: signal.signal(each, self._handle) for each in SIGNALS}
        self._hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
        self._receiver, sender = socket.socketpair()
        sender.setblocking(False)
        self._sender, self._wakeup = sender, signal.set_wakeup_fd(sender.fileno())
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._watching:
            return
        signal.set_wakeup_fd(self._wakeup)
        sys.unraisablehook = self._hook
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        self._sender.close()  # ends the watching thread

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Leaves the stop to whoever reads `requested`."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    @contextmanager
    def postponed(self) -> Iterator[None]:
        """Keeps the stop until the end of what must not be cut off in the middle."""
        with self.deferred():
            yield
        if self.requested is not None:
            raise Interrupted(self.requested)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.requested = signum
        if not self._deferred:
            raise Interrupted(signum)

    def _unraisable(self, what: Any) -> None:
        """Called where Python can raise no exception, as in a callback of its garbage collector."""
        if isinstance(what.exc_value, Interrupted):
            _exit("interrupted: nothing was lost", what.exc_value.signum)
        self._hook(what)

    def _watch(self) -> None:
        """In a thread of its own: the C part of Python writes each signal's number at once."""
        with self._receiver as receiver:
            while number := receiver.recv(1):
                if number[0] not in SIGNALS:
                    continue
                receiver.settimeout(SECONDS_TO_SAVE if self._deferred else SECONDS_TO_UNWIND)
                try:
                    if not receiver.recv(1):
                        return
                    _exit("stopped at the second signal", number[0])
                except TimeoutError:
                    _exit("stopped, what was under way took too long", number[0])


def _exit(reason: str, signum: int) -> NoReturn:
    print(f"{Path(sys.argv[0]).name}: {reason}", file=sys.stderr, flush=True)
    os._exit(128 + signum)
