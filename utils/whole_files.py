"""Files that appear under their names only when they are whole, and their hashes."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from utils.endings import no_room
from utils.errors import UsageError

PARTIAL = ".partial"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_of(value: Any) -> str:
    """sha256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    with whole(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Raises: UsageError where it holds no JSON object."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:  # of the decoders of characters and of JSON
        raise UsageError(f"{path} is damaged ({error}): move its folder away and start again") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path} is damaged: move its folder away and start again")
    return value


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary file that becomes `path` when the block ends well, and goes away when it does not.

    It is alone in a folder beside `path`, where a killed process leaves it: safetensors writes to a file with a name
    of its own choice first, in the same folder, which nobody would find elsewhere.
    """
    room = path.with_name(f".{path.name}{PARTIAL}")
    remove(room)
    room.mkdir()
    try:
        temporary = room / path.name
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except SafetensorError as error:  # its file errors are not OSErrors
        raise no_room(path, error) from error
    finally:
        remove(room)


def remove(left: Path) -> None:
    """The folder with all that is in it, or the file, if it is there."""
    if left.is_dir():
        shutil.rmtree(left)
    else:
        left.unlink(missing_ok=True)
