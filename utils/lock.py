"""One writer per folder: an advisory lock that goes with its process, however that ends. A thin layer over filelock.

The layer names the holder, removes the file, and goes on with a warning where a file system has no locks.
"""

import contextlib
import errno
import logging
import os
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from utils.errors import UsageError

log = logging.getLogger("pifa")

LOCK = ".lock"
UNSUPPORTED = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL)  # some network file systems


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock while the block runs. The file that a killed process left behind binds nobody.

    Raises: UsageError naming the process that holds it, or where the lock is a link to another file.
    """
    path = folder / LOCK
    # no soft lock where there are no locks: a file that a killed process leaves would bind everybody
    lock = FileLock(path, mode=0o644, blocking=False, fallback_to_soft=False, on_acquired=partial(_sign, path))
    _take(lock, path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is still held, so that nobody locks a name about to go
        lock.release()


def _take(lock: FileLock, path: Path) -> None:
    while True:
        try:
            lock.acquire()
            return
        except Timeout as error:
            holder = _holder(path)
            if holder is not None:
                raise UsageError(f"{path.parent} is being written by {holder}: let it end first") from error
            # the holder before has just removed it
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise _no_link(path) from error
            if error.errno not in UNSUPPORTED:
                raise
            log.warning("%s can't be locked here: see to it that no other process writes it", path.parent)
            return


def _sign(path: Path, descriptor: int) -> None:
    """Say in the file who holds it. Raises: UsageError where it has another name, too: it is somebody else's."""
    if os.fstat(descriptor).st_nlink > 1:
        raise _no_link(path)
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())


def _no_link(path: Path) -> UsageError:
    return UsageError(f"{path} is a link to another file: remove it")


def _holder(path: Path) -> str | None:
    """Whom the file names; None where it is gone."""
    try:
        return path.read_bytes()[:200].decode(errors="replace") or "another process"
    except FileNotFoundError:
        return None
    except OSError:
        return "another process"
