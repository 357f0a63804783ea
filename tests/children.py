"""Commands in processes of their own, forked from a server that has imported everything: quick to start and to kill."""

import contextlib
import io
import multiprocessing
import os
import resource
import signal
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

import PIFA

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["component.compress.folder", "component.pivot.folder", "transformers.models.llama", "tests.children"]
)
# what Python announces before it does it to a file
OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate")


def start(argv: list[str], errors: Path, **more) -> BaseProcess:
    """Run the command; its exit code is the child's, its stderr goes to the file. more: see `_run`."""
    child = SERVER.Process(target=_run, args=([str(word) for word in argv], errors), kwargs=more)
    child.start()
    return child


def finish(argv: list[str], errors: Path, **more) -> int:
    """The exit code; a negative one is the signal that ended it."""
    child = start(argv, errors, **more)
    child.join(120)
    assert child.exitcode is not None
    return child.exitcode


def _run(
    argv: list[str],
    errors: Path,
    folder: Path | None = None,
    kill_at: int | None = None,
    count_into: Path | None = None,
    largest_file: int | None = None,
) -> None:
    """folder: whose file operations count; kill_at: number of the one before which SIGKILL comes; count_into: file for
    how many there were; largest_file: bytes at which a file is refused to grow."""
    seen = 0

    def audit(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event in OPERATIONS and folder is not None and str(arguments[0]).startswith(str(folder)):
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        code = PIFA.main(argv)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    errors.write_text(said.getvalue())
    if count_into is not None:
        count_into.write_text(str(seen))
    sys.exit(code)
