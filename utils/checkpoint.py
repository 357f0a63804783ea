"""Checkpoint folders: shards, hashes, manifest, resume. Plain transformers folders, written file by file.

Every file appears under its name only when it is whole: it is written beside that and renamed. `manifest.json` holds
the hash of the flags and the sha256 of each shard; `finished_at` in `pifa.json` marks a finished run. One process
writes a folder at a time (lock.py).
"""

import contextlib
import datetime
import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from utils.endings import no_room
from utils.errors import UsageError
from utils.lock import LOCK, locked

log = logging.getLogger("pifa")

MANIFEST, RECORD, INDEX = "manifest.json", "pifa.json", "model.safetensors.index.json"
REST = "rest.safetensors"
PARTIAL = ".partial"
METHOD = "pifa"


def layer_shard(index: int) -> str:
    return f"layer-{index:05d}.safetensors"


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
    _remove(room)
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
        _remove(room)


def _remove(left: Path) -> None:
    """The folder with all that is in it, or the file, if it is there."""
    if left.is_dir():
        shutil.rmtree(left)
    else:
        left.unlink(missing_ok=True)


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
                _remove(left)
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

    def _note(self, shard: str, found: str) -> None:
        with self._noting:
            self.manifest["shards"][shard] = found
            write_json(self.folder / MANIFEST, self.manifest)

    def write_behind(self, shard: str, tensors: dict[str, Tensor]) -> None:
        """`write` while the caller goes on, once the shard before is written; `describe` waits for the last.

        tensors: nobody may change them any more. Raises: what writing the shard before has raised.
        """
        stored = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        self._finish_writing()
        self._written = self._hands.submit(self.write, shard, stored)

    def copy_behind(self, path: Path, found: str, check: Callable[[], None]) -> None:
        """Copy a shard that another folder has, while the caller goes on; `describe` waits for it.

        found: its sha256; check: raises where that is not to be trusted, and is waited for behind, too.
        """

        def copy() -> None:
            check()
            self._copy(path)
            (self.folder / path.name).chmod(0o644)  # as `write` leaves its shards
            self._note(path.name, found)

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
        raise UsageError(f"{folder} exists and nothing is ever overwritten: --resume goes on with it, or move it away")
    if not (folder / MANIFEST).is_file():
        started = {LOCK, f".{MANIFEST}{PARTIAL}"}  # all that a run leaves that was killed before its first file
        if not folder.is_dir() or {path.name for path in folder.iterdir()} - started:
            raise UsageError(f"{folder} exists but holds no run of this tool: move it away")
        return
    if read_json(folder / MANIFEST).get("flags") != flags_hash:
        raise UsageError(f"{folder} was started with other flags, another model or other data: choose another --prefix")


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


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint folder: its config.json, its pifa.json, its manifest."""

    folder: Path
    config: dict[str, Any]
    record: dict[str, Any]
    manifest: dict[str, Any]

    @property
    def layers(self) -> dict[str, dict[str, Any]]:
        return self.config["quantization_config"]["layers"]

    @property
    def kind(self) -> str:
        """`lowrank` as --mode m writes it, `narrow` with --prune flatllm, `pifa` as --mode pifa does, `quantized` as
        --mode quantize does.
        """
        return self.record["kind"]

    def verify(self) -> None:
        """Raises: UsageError naming the first shard that is missing or differs from its hash."""
        with self.verifying() as check:
            check(*self.manifest["shards"])

    @contextlib.contextmanager
    def verifying(self) -> Iterator[Callable[..., None]]:
        """Inside, all shards are hashed while the caller works; the call that is given waits for those it names.

        Raises, here or in that call: UsageError naming a shard that is missing or differs from its hash.
        """
        expected = self.manifest["shards"]
        for shard in expected:
            if not (self.folder / shard).is_file():
                raise UsageError(f"{self.folder / shard} is missing: make the checkpoint again")
        hands = ThreadPoolExecutor()
        found = {shard: hands.submit(sha256, self.folder / shard) for shard in expected}

        def check(*shards: str) -> None:
            for shard in shards:
                if found[shard].result() != expected[shard]:
                    path = self.folder / shard
                    raise UsageError(
                        f"{path} is damaged, its hash differs from the manifest: make the checkpoint again"
                    )

        try:
            yield check
        finally:
            hands.shutdown(cancel_futures=True)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Raises: UsageError where the path is no finished checkpoint of this tool."""
    folder = Path(path)
    if folder.is_file():
        raise UsageError(
            f"{folder} is a file, not a checkpoint folder; pickles (.pt) of other tools are never read: "
            "compress the model again with --mode m"
        )
    if not folder.is_dir():
        raise UsageError(f"no such checkpoint: {folder}; --mode m makes one")
    if not (folder / MANIFEST).is_file():
        raise UsageError(f"{folder} is not a checkpoint of this tool: it has no {MANIFEST}; --mode m makes one")
    if not is_finished(folder):
        raise UsageError(f"{folder} is unfinished: run its command again with --resume")
    config, record, manifest = (read_json(folder / name) for name in ("config.json", RECORD, MANIFEST))
    return Checkpoint(folder, config, record, manifest)


def is_finished(folder: Path) -> bool:
    record = folder / RECORD
    return record.is_file() and "finished_at" in read_json(record)


def finished_record(folder: Path) -> dict[str, Any] | None:
    """The record of a folder that is finished, said aloud; None of any other.

    A run that was killed right behind its record left its lock there: it goes, unless somebody holds it.
    """
    if not is_finished(folder):
        return None
    log.warning("%s is finished already", folder)
    if (folder / LOCK).exists():
        with contextlib.suppress(UsageError), locked(folder):
            pass
    return read_checkpoint(folder).record


def newest_checkpoint(save_path: Path, kind: str | None) -> Checkpoint:
    """The newest finished checkpoint under save_path, of the given kind or of any.

    Raises: UsageError where there is none.
    """
    # a profile has a manifest too, but no config
    folders = [path.parent for path in save_path.glob(f"*/{MANIFEST}") if (path.parent / "config.json").is_file()]
    found = [read_checkpoint(folder) for folder in folders if is_finished(folder)]
    found = [checkpoint for checkpoint in found if kind in (None, checkpoint.kind)]
    if not found:
        which = f"{kind} checkpoint" if kind else "checkpoint"
        raise UsageError(f"no finished {which} under {save_path}: give --model_path, or run --mode m first")
    return max(found, key=lambda checkpoint: checkpoint.record["finished_at"])


def open_shard(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """All tensors of a shard, or those of wanted names. Raises: UsageError where it can't be read."""
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys() if wanted(name)}  # noqa: SIM118 (not a dict)


def open_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a shard. Raises: UsageError where it can't be read."""
    with _opened(path) as file:
        return file.get_tensor(name)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} is damaged ({error}): make it again") from error


BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def stored_bytes(view) -> int:
    """Bytes of a tensor on disk, from its header."""
    return math.prod(view.get_shape()) * BYTES[view.get_dtype()]


@dataclass(frozen=True)
class Counts:
    """What a folder stores, counted from its tensors; biases are part of `model` only."""

    linears: int
    dense_linears: int
    model: int
    linear_bytes: int

    @property
    def density(self) -> float:
        return self.linears / self.dense_linears

    @property
    def density_model(self) -> float:
        return self.model / (self.model - self.linears + self.dense_linears)


PACKED = ("weight_packed", "weight_zero_point")  # 32-bit words full of smaller integers


def _bits_of(entry: Mapping[str, Any], factor: str) -> int | None:
    """Of the integers that a linear, or this factor of it, is stored as; None where they are no integers."""
    return entry.get("outer_bits" if factor in ("coeff", "u") and "outer_bits" in entry else "bits")


def stored_tensors(folder: Path, layers: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str | None, int, int]]:
    """(linear, numbers, bytes) of every tensor on disk, from the headers: the linear of `layers` that it counts for.

    A bias counts for none, as all that is no linear's: None. Of packed integers each is a number.
    """
    for shard in sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values())):
        with safe_open(folder / shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                view = file.get_slice(name)
                parts = name.split(".")
                owner = next((o for cut in (1, 2) if (o := ".".join(parts[:-cut])) in layers), None)
                counted = None if parts[-1] == "bias" else owner
                bits = _bits_of(layers[owner], parts[-2]) if owner is not None and parts[-1] in PACKED else None
                numbers = math.prod(view.get_shape())
                yield counted, numbers * (32 // bits) if bits else numbers, stored_bytes(view)


def count_numbers(folder: Path, layers: dict[str, dict[str, Any]]) -> Counts:
    """Count every number of the compressed linears, index vectors included, from the safetensors on disk."""
    linears = model = size = 0
    for owner, numbers, stored in stored_tensors(folder, layers):
        model += numbers
        if owner is not None:
            linears += numbers
            size += stored
    dense = sum(entry["in_features"] * entry["out_features"] for entry in layers.values())
    return Counts(linears, dense, model, size)
