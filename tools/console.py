# SPDX-License-Identifier: Apache-2.0
"""What a person sees of a tool: steps with times, one clear message per failure, an exit status."""

import errno
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

LINE = 90  # characters of a progress text: with the time before them they fit one line
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class ToolError(Exception):
    """A failure that the user can understand: what, where, which value, and the cure."""


def say(text: str = "") -> None:
    """Prints a line at once, also into a pipe."""
    print(text, flush=True)


@contextmanager
def step(name: str) -> Iterator[None]:
    """Announces a step, then says how long it took; a failing one is left to main()."""
    say(f"==> {name}")
    started = time.monotonic()
    yield
    say(f"    done in {time.monotonic() - started:.1f} s")


class Progress:
    """One line that tells how long something has been going on.

    It is redrawn on a terminal, and printed anew every `every` seconds (an addition to the log)
    elsewhere.
    """

    def __init__(self, every: float = 10.0) -> None:
        self._every = every
        self._started = time.monotonic()
        self._next = 0.0
        self._drawn = False

    def update(self, text: str) -> None:
        """Shows `text` with the seconds since the start."""
        elapsed = time.monotonic() - self._started
        text = text[:LINE]
        if sys.stdout.isatty():
            print(f"\r\x1b[K    {elapsed:4.0f} s  {text}", end="", flush=True)
            self._drawn = True
        elif elapsed >= self._next:
            say(f"    {elapsed:4.0f} s  {text}")
            self._next = elapsed + self._every

    def close(self) -> None:
        """Ends the redrawn line."""
        if self._drawn:
            print(flush=True)
            self._drawn = False


class _Terminated(BaseException):
    """A signal as an exception, so that every `finally` runs; the argument is its number."""


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise _Terminated(signum)


def run_main(main: Callable[[], int]) -> None:
    """Runs a tool's main() and ends the process with its status.

    A ToolError, a full disk and Ctrl-C become one line on stderr and a status that is not 0.
    SIGTERM and SIGHUP unwind like exceptions: what the tool started is stopped.
    """
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, _terminate)
    try:
        status = main()
    except ToolError as error:
        status = _failed(str(error))
    except KeyboardInterrupt:
        _failed("interrupted")
        status = INTERRUPTED
    except _Terminated as error:
        signum = error.args[0]
        _failed(f"ended by {signal.Signals(signum).name}")
        status = 128 + signum
    except OSError as error:
        status = _failed(_explain(error))
    sys.exit(status)


def _failed(text: str) -> int:
    sys.stdout.flush()
    print(f"error: {text}", file=sys.stderr, flush=True)
    return 1


def _explain(error: OSError) -> str:
    """An operating-system error with its cure, where one is known."""
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left on the disk{where}: free some and run the same command again"
    return f"{error.strerror or error}{where}"
