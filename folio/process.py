"""A script as a process: exit codes, errors on one line, and signals that stop a run cleanly."""

import errno
import functools
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

from data.errors import UserError

USER_ERRNOS = {  # a path that cannot be right; a full or broken disk is not among these
    errno.ENOENT,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}


def script(main: Callable[[list[str]], int | None]) -> Callable[[list[str] | None], int]:
    """Wrap a script's `main(argv)` so that it returns an exit code and errors take one line.

    0: done; 2: a mistake of the user's; 1: the machine failed; 130 and 143: SIGINT and SIGTERM,
    after cleaning up.
    """

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
            if getattr(sys, name) is None:  # closed, as cron may leave it
                setattr(sys, name, open(os.devnull, mode))
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # a notebook's cannot, and need not
                stream.reconfigure(errors="replace")  # a narrow encoding must not end a run
        with _sigterm_exits():
            try:
                return main(sys.argv[1:] if argv is None else argv) or 0
            except UserError as error:
                message, code = error, 2
            except BrokenPipeError:  # the reader left, as in `python sample.py | head`
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 1
            except (OSError, MemoryError) as error:
                message = str(error) or "out of memory"
                code = 2 if getattr(error, "errno", None) in USER_ERRNOS else 1
            except RuntimeError as error:  # torch raises no MemoryError
                if not re.search("out of memory|allocate memory", str(error)):
                    raise
                message, code = "out of memory", 1
            except KeyboardInterrupt:
                message, code = "interrupted", 130
        print("error:", " ".join(str(message).split()), file=sys.stderr)
        return code

    return run


class SignalHandlers:
    """Within it these signals call `handler`. In a thread, where Python allows none, it does
    nothing."""

    def __init__(self, signals: list[signal.Signals], handler: Callable[[int, FrameType], None]):
        self._signals, self._handler, self._previous = signals, handler, {}

    def __enter__(self) -> "SignalHandlers":
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._handler) for s in self._signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def _sigterm_exits() -> SignalHandlers:
    """SIGTERM raises SystemExit, so that `finally` blocks clean up."""
    return SignalHandlers([signal.SIGTERM], lambda *_: sys.exit(128 + signal.SIGTERM))


class Stopped(Exception):
    """A signal came during work that can be repeated when the run is resumed."""


class StopSignals(SignalHandlers):
    """Within it SIGINT, SIGTERM and SIGHUP interrupt nothing. `caught` is the last one that came;
    the training loop looks at it."""

    def __init__(self):
        signals = [signal.SIGINT, signal.SIGTERM]
        hangup = getattr(signal, "SIGHUP", None)  # a terminal that is closed; not on Windows
        if hangup and signal.getsignal(hangup) is not signal.SIG_IGN:  # nohup ignores it
            signals.append(hangup)
        super().__init__(signals, self._catch)
        self.caught: signal.Signals | None = None

    def _catch(self, number: int, frame: FrameType) -> None:
        self.caught = signal.Signals(number)

    def check(self, *_: object) -> None:
        """Raise Stopped once a signal has come."""
        if self.caught:
            raise Stopped
