"""What SIGTERM (a preemption), Ctrl-C and a terminal that closes do: the work ends at a safe point.

A second signal ends it at once, but no SIGHUP: a machine that shuts down sends it together with SIGTERM, a terminal
more than once. Whoever had it ignored, as `nohup` does, meant it.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SAME_SIGNAL_SECONDS = 0.2  # One that comes so soon after the first is the same: launchers tell a process and its group.


class Stopped(BaseException):
    """The process was told to stop. Like KeyboardInterrupt, it is no `Exception`, so that nobody swallows it.

    Attributes:
      signal: number of the signal that asked for it.
      exit_code: 143 for SIGTERM, 130 for Ctrl-C, 129 for SIGHUP, as shells count.
    """

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number
        self.exit_code = 128 + number


class Request:
    """Whether somebody has asked this process to stop.

    Attributes:
      signal: number of the signal that asked for it; 0 as long as nobody has.
    """

    def __init__(self):
        self.signal = 0


@contextlib.contextmanager
def raising() -> Iterator[None]:
    """Within, a signal raises `Stopped` wherever the main thread is: for what tidies up, and is started anew.

    In C, as in XLA's compiler, only when that returns.
    """
    stopped = None

    def stop(number: int) -> None:
        nonlocal stopped
        stopped = Stopped(number)
        raise stopped

    with _handling(stop, "stopping"):
        try:
            yield
        except Exception as error:
            # Where the signal came, it may have been made an error: Python 3.11 makes RuntimeError of whatever is
            # raised while a class is put together, during an import for instance.
            if stopped is None:
                raise
            raise stopped from error


@contextlib.contextmanager
def deferred() -> Iterator[Request]:
    """Within, a signal is only noted in what this gives: for what looks at it regularly, and saves before it ends."""
    request = Request()

    def note(number: int) -> None:
        request.signal = number

    with _handling(note, "saving, then stopping"):
        yield request


def unhandled() -> contextlib.AbstractContextManager[None]:
    """Within, a signal ends the process at once: for minutes in a compiler, in which Python calls no handler."""
    return _handlers(signal.SIG_DFL)


@contextlib.contextmanager
def _handling(first: Callable[[int], None], told: str) -> Iterator[None]:
    """Calls `first` at the first signal, and says `told`; ends the process at the second."""
    seen = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal seen
        if not seen:
            seen = True
            first(number)

    with _handlers(handle), _watched(told):
        yield


@contextlib.contextmanager
def _watched(told: str) -> Iterator[None]:
    """Says `told` at the first signal and ends the process at the second, also while the main thread is in C.

    Python calls its handlers in the main thread, between its own instructions: not while XLA compiles, for minutes.
    But it writes the signal's number to a file at once, and a thread can wait for that.
    """
    if not _in_main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)  # Python asks for it: a handler must not wait.

    def watch() -> None:
        first = None
        while (number := os.read(reader, 1)[0]) != 0:
            if number not in SIGNALS:
                continue
            if first is None:
                first = time.monotonic()
                line = f"dsnet: {signal.Signals(number).name}: {told}; once more stops at once\n"
                with contextlib.suppress(OSError):  # Whoever read it may be gone.
                    os.write(2, line.encode())
            elif number != signal.SIGHUP and time.monotonic() - first > SAME_SIGNAL_SECONDS:
                os._exit(128 + number)

    thread = threading.Thread(target=watch, name="signals", daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.write(writer, bytes(1))
        thread.join()
        os.close(reader)
        os.close(writer)


@contextlib.contextmanager
def _handlers(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> Iterator[None]:
    """Puts the old ones back in the end."""
    if not _in_main_thread():
        yield
        return
    handled = [number for number in SIGNALS if (number, signal.getsignal(number)) != (signal.SIGHUP, signal.SIG_IGN)]
    before = {number: signal.signal(number, handler) for number in handled}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _in_main_thread() -> bool:
    """Python gives signals to the main thread alone."""
    return threading.current_thread() is threading.main_thread()
