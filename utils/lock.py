"""One writer per folder: an advisory lock that goes with its process, however that ends."""

import contextlib
import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from utils.errors import UsageError

log = logging.getLogger("pifa")

LOCK = ".lock"
UNSUPPORTED = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL)  # some network file systems


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock while the block runs. The file that a killed process left behind binds nobody.

    Raises: UsageError naming the process that holds it.
    """
    path = folder / LOCK
    descriptor = _taken(path)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is still held, so that nobody locks a name about to go
        os.close(descriptor)


def _taken(path: Path) -> int:
    """A descriptor that holds the lock on the file which `path` names."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
            if error.errno not in UNSUPPORTED:
                os.close(descriptor)
                raise UsageError(f"{path.parent} is being written by {holder}: let it end first") from error
            log.warning("%s can't be locked here: see to it that no other process writes it", path.parent)
            return descriptor
        if _names(path, descriptor):
            return descriptor
        os.close(descriptor)  # the holder before has just removed it


def _names(path: Path, descriptor: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    return False
