"""A checkpoint made from a checkpoint, as --mode pifa, finetune and quantize make them.

What a mode does not change goes over from the source: config, record, tokenizer. What loads the folder is of today.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from component.checkpoint.carried import loader_files
from component.checkpoint.counting import densities
from component.checkpoint.entries import Entries
from component.checkpoint.reading import INDEX, MANIFEST, RECORD, Checkpoint, finished_record
from component.checkpoint.request import Request
from component.checkpoint.writer import CheckpointWriter, check_target
from component.ranks.cost import LOW_RANK, PIVOTED
from utils import report
from utils.whole_files import hash_of


@dataclass(frozen=True, kw_only=True)
class Derivation:
    """One checkpoint in the making.

    suffix: what its folder's name has behind the source's, `{hash}` for 8 digits of the hash; decisive: all that
    decides its bytes beside the source and the dtype.
    """

    request: Request
    source: Checkpoint
    suffix: str
    decisive: Mapping[str, Any]

    @property
    def dtype(self) -> str:
        """Of the parameters that are written, by name."""
        return self.request.dtype or self.source.record["dtype"]

    @cached_property
    def flags_hash(self) -> str:
        """What the run is known by."""
        return hash_of({"source": self.source.manifest, "dtype": self.dtype, **self.decisive})

    @cached_property
    def folder(self) -> Path:
        suffix = self.suffix.format(hash=self.flags_hash[:8])
        return self.request.save_path / f"{self.request.prefix}{self.source.folder.resolve().name}{suffix}"

    def finished(self) -> dict[str, Any] | None:
        """The record of a run that is finished already. Raises: UsageError where the folder can't be written."""
        check_target(self.folder, self.flags_hash, self.request.resume)
        return finished_record(self.folder)

    def writer(self) -> CheckpointWriter:
        return CheckpointWriter(self.folder, self.flags_hash, self.request.resume)

    def copy_behind(self, writer: CheckpointWriter, shard: str, check: Callable[[], None]) -> None:
        """Copy a shard that does not change, while the caller goes on. check: raises where the source is damaged."""
        if not writer.finished(shard):
            writer.copy_behind(self.source.folder / shard, self.source.manifest["shards"][shard], check)

    def config(self, entries: Entries) -> dict[str, Any]:
        """config.json: the source's, with another dtype and other entries."""
        quantization = {**self.source.config["quantization_config"], "layers": entries}
        return {**self.source.config, "dtype": self.dtype, "quantization_config": quantization}

    def files_beside(self, own: Collection[str] = ()) -> list[Path]:
        """Files to copy: the source's tokenizer and the like, and today's loader in place of the source's.

        own: names of files that the mode writes itself.
        """
        loader = loader_files()
        made = {*self.source.manifest["shards"], MANIFEST, RECORD, INDEX, "config.json", *own}
        made |= {path.name for path in loader}
        others = sorted(path for path in self.source.folder.iterdir() if path.is_file() and path.name not in made)
        return [path for path in others if not path.name.startswith(".")] + loader

    def densities(self, entries: Entries) -> dict[str, Any]:
        """Those of the finished shards; what was asked for stays as the source's record has it."""
        record = self.source.record
        storage = PIVOTED if record["use_pifa"] else LOW_RANK
        return densities(self.folder, entries, ranks_paid_for=storage.name, asked=record["density_asked"])

    def record(self, mode: str, watch: report.Stopwatch, more: Mapping[str, Any]) -> dict[str, Any]:
        """The result record: the source's, with what the mode did in its place. more: entries of the mode's own."""
        return {
            **self.source.record,
            "mode": mode,
            "command": self.request.command,
            "source": str(self.source.folder),
            "path": str(self.folder),
            "dtype": self.dtype,
            **more,
            **watch.readings(),
            "device": report.device_name(watch.device),
            "versions": report.versions(),
        }
