"""Scripts as processes: exit codes, errors on one line, and signals that stop a run cleanly."""

import atexit
import errno
import functools
import gc
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType

from data.errors import UserError

USER_ERRNOS = {  # bad paths, as opposed to a full or failing disk
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


def _report_exception(kind: type, error: BaseException, traceback: TracebackType | None) -> None:
    """For Ctrl-C while a script imports its modules, where no function can catch it."""
    if issubclass(kind, KeyboardInterrupt):
        print("error: interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = _report_exception

# A thread of libgomp that waits for the others spins, by default so long that a second program on
# one core holds up all of them. 2,000 turns take about as long as falling asleep and waking up. It
# is read once, when torch is imported (tests/bench/contention.py).
if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def script(main: Callable[[list[str]], int | None]) -> Callable[[list[str] | None], int]:
    """Wrap a script's `main(argv)` so that it returns an exit code and prints errors on one line.

    0: done; 1: system error; 2: user error; 3: training diverged; 129, 130 and 143: SIGHUP, SIGINT
    and SIGTERM, after cleaning up.
    """
    gc.freeze()  # what was imported stays: looking for garbage in it takes 0.3 s when Python exits

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
            if getattr(sys, name) is None:  # closed, for example by cron
                setattr(sys, name, open(os.devnull, mode))
        for stream, encoding in ((sys.stdin, "utf-8"), (sys.stdout, None), (sys.stderr, None)):
            if hasattr(stream, "reconfigure"):  # not in a notebook
                stream.reconfigure(encoding=encoding, errors="replace")  # a run must not end there
        if argv is None:  # in UTF-8, whatever the locale
            argv = [os.fsencode(word).decode("utf-8", "surrogateescape") for word in sys.argv[1:]]
        with SignalHandlers([signal.SIGTERM], _exit):  # so that `finally` blocks clean up
            code = _exit_code(main, argv)
        if is_of_torchrun():
            # torchrun ends all processes when one has failed; each is to end with its own code
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            atexit.unregister(_end)
            atexit.register(_end, code)
        return code

    return run


def is_of_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def _end(code: int) -> None:
    """End one of torchrun's processes. The destructors of gloo's threads sometimes abort it."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def _exit_code(main: Callable[[list[str]], int | None], argv: list[str]) -> int:
    """Call `main` and return the script's exit code, after printing an error that it raises."""
    try:
        return main(argv) or 0
    except BrokenPipeError:  # the reader closed the pipe, as in `sample.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except EndedElsewhere as error:
        return error.code
    except (Exception, KeyboardInterrupt) as error:
        message, code = explain(error)
        if not message:
            raise
    print("error:", " ".join(message.split()), file=sys.stderr)
    return code


def explain(error: BaseException) -> tuple[str, int]:
    """The message and the exit code for an error; an empty message if it is a bug."""
    match error:
        case UserError():
            return str(error), 2
        case Diverged():
            return str(error), 3
        case EndedElsewhere():
            return "", error.code
        case SystemExit():
            return "", int(error.code or 0)
        case KeyboardInterrupt():
            return "interrupted", 130
        case OSError() | MemoryError():
            is_user_error = getattr(error, "errno", None) in USER_ERRNOS
            return str(error) or "out of memory", 2 if is_user_error else 1
        case RuntimeError() if re.search("out of memory|allocate memory", str(error)):
            return "out of memory", 1  # torch does not raise MemoryError
    return "", 1


class Diverged(Exception):
    """The loss, a gradient or a weight is not finite."""


class EndedElsewhere(Exception):
    """Another process of the same run has failed, and has printed why."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


class SignalHandlers:
    """A context manager that installs `handler`. Outside the main thread, where Python does not
    allow it, nothing is installed."""

    def __init__(self, signals: list[signal.Signals], handler: Callable[[int, FrameType], None]):
        self._signals, self._handler, self._previous = signals, handler, {}

    def __enter__(self) -> "SignalHandlers":
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._handler) for s in self._signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _exit(number: int, frame: FrameType) -> None:
    sys.exit(128 + number)


class Stopped(Exception):
    """A signal interrupted work that is repeated when the run is resumed."""


class StopSignals(SignalHandlers):
    """A context manager in which SIGINT, SIGTERM and SIGHUP only set `caught`, which the training
    loop polls."""

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
        """Raise Stopped if a signal was received."""
        if self.caught:
            raise Stopped
