"""Checkpoint folders: plain transformers folders, with a manifest and a record beside. How they are named and read.

`manifest.json` holds the hash of the flags and the sha256 of each shard; `finished_at` in `pifa.json` marks a finished
run. checkpoint/writer.py writes them, checkpoint/counting.py counts what is in them.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from utils.errors import UsageError
from utils.lock import LOCK, locked
from utils.whole_files import PARTIAL, read_json, remove, sha256

log = logging.getLogger("pifa")

MANIFEST, RECORD, INDEX = "manifest.json", "pifa.json", "model.safetensors.index.json"
REST = "rest.safetensors"


def layer_shard(index: int) -> str:
    return f"layer-{index:05d}.safetensors"


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
        hashes = {shard: hands.submit(sha256, self.folder / shard) for shard in expected}

        def check(*shards: str) -> None:
            for shard in shards:
                if hashes[shard].result() != expected[shard]:
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
    return Checkpoint(folder=folder, config=config, record=record, manifest=manifest)


def is_finished(folder: Path) -> bool:
    record = folder / RECORD
    return record.is_file() and "finished_at" in read_json(record)


def finished_record(folder: Path) -> dict[str, Any] | None:
    """The record of a folder that is finished, said aloud; None of any other.

    A run that was killed right behind its record left its lock there, and what it wrote the record in: both go,
    unless somebody holds the lock.
    """
    if not is_finished(folder):
        return None
    log.warning("%s is finished already", folder)
    if (folder / LOCK).exists():
        with contextlib.suppress(UsageError), locked(folder):
            for left in folder.glob(f".*{PARTIAL}"):
                remove(left)
    return read_checkpoint(folder).record


def newest_checkpoint(save_path: Path, kind: str | None) -> Checkpoint:
    """The newest finished checkpoint under save_path, of the given kind or of any.

    Raises: UsageError where there is none.
    """
    # a profile has a manifest too, but no config
    folders = [path.parent for path in save_path.glob(f"*/{MANIFEST}") if (path.parent / "config.json").is_file()]
    finished = [read_checkpoint(folder) for folder in folders if is_finished(folder)]
    finished = [checkpoint for checkpoint in finished if kind in (None, checkpoint.kind)]
    if not finished:
        which = f"{kind} checkpoint" if kind else "checkpoint"
        raise UsageError(f"no finished {which} under {save_path}: give --model_path, or run --mode m first")
    return max(finished, key=lambda checkpoint: checkpoint.record["finished_at"])


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
