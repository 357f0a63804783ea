"""Writes a checkpoint folder file by file, each whole (whole_files.py), so that an interrupted run can be gone on with.

One process writes a folder at a time (lock.py).
"""

import contextlib
import datetime
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from component.checkpoint.counting import stored_bytes
from component.checkpoint.reading import INDEX, MANIFEST, RECORD
from utils.errors import UsageError
from utils.lock import LOCK, locked
from utils.whole_files import PARTIAL, read_json, remove, sha256, whole, write_json


class CheckpointWriter:
    """Writes one checkpoint folder shard by shard, and knows which shards an earlier, interrupted run finished.

    A context manager: inside, the folder is this process's alone. A run that got nowhere leaves no folder.

    Raises: UsageError where the folder exists and `resume` is not set, belongs to other flags, can't be written or is
    being written by another process.
    """

    def __init__(self, folder: Path, flags_hash: str, resume: bool):
        self.folder = folder
        self.manifest: dict[str, Any] = {"flags": flags_hash, "shards": {}}
        self._resume = resume
        self._made: list[Path] = []  # folders that were not there before, from the innermost one
        self._held = contextlib.ExitStack()
        self._hands = ThreadPoolExecutor(2, "write")
        self._noting = threading.Lock()
        self._written: Future[None] | None = None
        self._copied: list[Future[None]] = []

    def __enter__(self) -> Self:
        flags_hash = self.manifest["flags"]
        check_target(self.folder, flags_hash, self._resume)
        self._made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as held:
            held.enter_context(locked(self.folder))
            check_target(self.folder, flags_hash, True)  # nobody else can change it now
            for left in self.folder.glob(f".*{PARTIAL}"):
                remove(left)
            if (self.folder / MANIFEST).is_file():
                self.manifest = read_json(self.folder / MANIFEST)
            else:
                write_json(self.folder / MANIFEST, self.manifest)
            self._held = held.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._hands.shutdown()
        with contextlib.ExitStack() as after:
            if self.manifest.keys() == {"flags", "shards"} and not self.manifest["shards"]:
                after.callback(_remove_empty, self._made or [self.folder])
                (self.folder / MANIFEST).unlink(missing_ok=True)
            self._held.close()

    @property
    def settled(self) -> dict[str, Any] | None:
        """What an interrupted run in this folder had chosen, if it had."""
        return self.manifest.get("settled")

    def finished(self, shard: str) -> bool:
        """Whether the shard is there, whole and unharmed."""
        expected = self.manifest["shards"].get(shard)
        path = self.folder / shard
        return expected is not None and path.is_file() and sha256(path) == expected

    def write(self, shard: str, tensors: dict[str, Tensor]) -> None:
        """Write the shard, then note its hash: a crash between the two costs one shard, never a wrong one."""
        with whole(self.folder / shard) as temporary:
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary, {"format": "pt"})
            temporary.chmod(0o644)  # safetensors makes files that only their owner may read
        self._note(shard, sha256(self.folder / shard))

    def _note(self, shard: str, hashed: str) -> None:
        with self._noting:
            self.manifest["shards"][shard] = hashed
            write_json(self.folder / MANIFEST, self.manifest)

    def write_behind(self, shard: str, tensors: dict[str, Tensor]) -> None:
        """`write` while the caller goes on, once the shard before is written; `describe` waits for the last.

        tensors: nobody may change them any more. Raises: what writing the shard before has raised.
        """
        stored = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        self._finish_writing()
        self._written = self._hands.submit(self.write, shard, stored)

    def copy_behind(self, path: Path, hashed: str, check: Callable[[], None]) -> None:
        """Copy a shard that another folder has, while the caller goes on; `describe` waits for it.

        hashed: its sha256; check: raises where that is not to be trusted, and is waited for behind, too.
        """

        def copy() -> None:
            check()
            self._copy(path)
            (self.folder / path.name).chmod(0o644)  # as `write` leaves its shards
            self._note(path.name, hashed)

        self._copied.append(self._hands.submit(copy))

    def flush(self) -> None:
        """Wait for what is done behind. Raises: what that has raised."""
        self._finish_writing()
        while self._copied:
            self._copied.pop().result()

    def _finish_writing(self) -> None:
        written, self._written = self._written, None
        if written:
            written.result()

    def settle(self, choices: dict[str, Any]) -> None:
        """Note what was chosen before the first shard, so that a later run goes on with the same."""
        self.manifest["settled"] = choices
        write_json(self.folder / MANIFEST, self.manifest)

    def describe(self, config: dict[str, Any], extra_files: list[Path]) -> None:
        """Once all shards are there: write the index, the config and the files that stand beside them.

        Raises: what writing the last shard has raised.
        """
        self.flush()
        weight_map, size = {}, 0
        for shard in sorted(self.manifest["shards"]):
            with safe_open(self.folder / shard, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    weight_map[name] = shard
                    size += stored_bytes(file.get_slice(name))
        write_json(self.folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
        write_json(self.folder / "config.json", config)
        for path in extra_files:
            self._copy(path)

    def _copy(self, path: Path) -> None:
        with whole(self.folder / path.name) as temporary:
            shutil.copyfile(path, temporary)

    def seal(self, record: dict[str, Any]) -> dict[str, Any]:
        """Write the record, which marks the folder as finished; returns it with `finished_at`."""
        sealed = record | {"finished_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")}
        write_json(self.folder / RECORD, sealed)
        return sealed


def check_target(folder: Path, flags_hash: str, resume: bool) -> None:
    """Raises: UsageError where a run with these flags can't write `folder`."""
    parent = next(p for p in (folder.parent, *folder.parent.parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK) or not _accepts_files(parent):
        raise UsageError(f"cannot write to {folder.parent}: choose another --save_path")
    if not folder.exists():
        return
    if not resume:
        refuse_existing(folder, "--resume goes on with it, or move it away")
    if not (folder / MANIFEST).is_file():
        started = {LOCK, f".{MANIFEST}{PARTIAL}"}  # all that a run leaves that was killed before its first file
        if not folder.is_dir() or {path.name for path in folder.iterdir()} - started:
            raise UsageError(f"{folder} exists but holds no run of this tool: move it away")
        return
    if read_json(folder / MANIFEST).get("flags") != flags_hash:
        raise UsageError(f"{folder} was started with other flags, another model or other data: choose another --prefix")


def refuse_existing(path: Path, advice: str) -> None:
    """Raises: UsageError where `path` exists. advice: what to do then."""
    if path.exists():
        raise UsageError(f"{path} exists and nothing is ever overwritten: {advice}")


def _remove_empty(folders: list[Path]) -> None:
    """Each that is empty, up to the first that is not."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _accepts_files(folder: Path) -> bool:
    """os.access says yes to root on read-only file systems, and to everything on some: try."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
