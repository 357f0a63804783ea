"""Runs that are ended from outside end in one line, with everything that they hold given back on the way out."""

import contextlib
import errno
import signal
import threading
from collections.abc import Iterator
from typing import NoReturn

from utils.errors import RunError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ADVICE = "the same command with --resume goes on"


class _Ended(BaseException):
    """What the signal raises: no Exception, which libraries catch where they try one way after the other."""


@contextlib.contextmanager
def one_line_endings() -> Iterator[None]:
    """SIGTERM and a full disk end the block with a RunError; also a decorator.

    The error is raised in the main thread, wherever that is, so that temporary files, locks and waiting threads go as
    they do after any other error. Further signals are then ignored: there is nothing left to stop.
    """

    signals: list[int] = []

    def end(number: int, _frame) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signals.append(number)
        raise _Ended

    in_main = threading.current_thread() is threading.main_thread()  # no other one may set handlers
    before = signal.signal(signal.SIGTERM, end) if in_main else None
    try:
        yield
    except BaseException as error:
        if signals:  # whatever it became on its way: code in C may replace it by an error of its own
            raise RunError(f"ended by SIGTERM: {ADVICE}") from error
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise no_room(error.filename or "a file", error) from error
        raise
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before)


def no_room(where: object, reason: object) -> RunError:
    return RunError(f"can't write {where} ({reason}): make room, then {ADVICE}")
