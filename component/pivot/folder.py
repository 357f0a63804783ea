"""The engine of --mode pifa: a folder of low-rank factors in, a folder of pivots and coefficients out."""

import logging
from collections.abc import Callable
from typing import Any

import torch
import transformers
from tqdm import tqdm

from component.checkpoint import reading as files
from component.checkpoint.choose import find_checkpoint
from component.checkpoint.derive import Derivation
from component.checkpoint.entries import kept_of
from component.checkpoint.reading import Checkpoint
from component.checkpoint.writer import CheckpointWriter
from component.pivot.settings import Settings
from component.pivot.shards import foldable, note_entries, pivot_tensors
from utils import models, report
from utils.endings import one_line_endings
from utils.junctions import Skeleton
from utils.placement import wake

log = logging.getLogger("pifa")


@one_line_endings()
def pivot_folder(settings: Settings) -> dict[str, Any]:
    """Pivot a low-rank checkpoint and write `<its folder>-pifa`; returns the result record.

    With `fold`, channels that go on to another linear are left in pivot order, and the folder is `<...>-pifa-fold`.

    Raises: UsageError for a checkpoint without factors to pivot, RunError where a factor is not finite.
    """
    watch = report.Stopwatch(torch.device(settings.request.device))
    source = find_checkpoint(
        settings.request.model_path,
        settings.request.save_path,
        kind="lowrank",
        no_original="--mode pifa needs a low-rank checkpoint, not the original model: run --mode m first",
        refusal=_refusal,
    )
    suffix = f"-pifa{'-fold' * settings.fold}"
    new = Derivation(request=settings.request, source=source, suffix=suffix, decisive=settings.as_json())
    if record := new.finished():
        return record
    with source.verifying() as check, new.writer() as writer:
        return _convert(new, writer, fold=settings.fold, check=check, watch=watch)


def _refusal(source: Checkpoint) -> str | None:
    if source.kind == "narrow":
        return f"{source.folder} has no factors to pivot: --prune flatllm leaves out whole channels"
    if source.kind != "lowrank":
        done = "quantized" if source.kind == "quantized" else "pivoted"
        return f"{source.folder} is {done} already: --mode pifa takes what --mode m wrote"
    return None


def _convert(
    new: Derivation, writer: CheckpointWriter, *, fold: bool, check: Callable[..., None], watch: report.Stopwatch
) -> dict[str, Any]:
    """check: waits for shards of the source to be hashed, and raises where one is damaged."""
    source, device = new.source, watch.device
    skeleton = _skeleton(source) if fold else None
    entries = {name: dict(entry) for name, entry in source.layers.items()}
    wake(device)  # while the source is hashed
    layer_seconds: list[float] = []
    # what has no factors comes first: it is large, and is copied while layers are pivoted
    shards = sorted(source.manifest["shards"], key=lambda shard: (shard != files.REST, shard))
    for shard in tqdm(shards, desc="pivot", unit="shard"):
        before = watch.seconds()
        if shard == files.REST and new.dtype == source.record["dtype"]:
            new.copy_behind(writer, shard, lambda: check(*shards))
            continue
        check(shard)
        tensors = files.open_shard(source.folder / shard)
        inside = {name: entry for name, entry in entries.items() if f"{name}.weight" in tensors}
        probe = skeleton.probe_of(inside) if skeleton else None
        if writer.finished(shard):
            stored = files.open_shard(new.folder / shard)
        else:
            stored = pivot_tensors(tensors, inside, device=device, dtype=models.DTYPES[new.dtype], probe=probe)
            if inside:
                layer_seconds.append(round(watch.seconds() - before, 3))
            check(*shards)  # the first layer was pivoted meanwhile; nothing is made of a source that is damaged
            writer.write_behind(shard, stored)
        note_entries(inside, stored, foldable(probe, inside))
    if fold and not any("folded" in entry for entry in entries.values()):
        log.warning("no linear of this model meets the next one channel by channel: nothing was folded")

    writer.describe(new.config(entries), new.files_beside())
    own = {
        "kind": "pifa",
        "layer_seconds": layer_seconds,
        **new.densities(entries),
        "ranks": {name: kept_of(entry) for name, entry in entries.items()},
    }
    return writer.seal(new.record("pifa", watch, own))


def _skeleton(source: Checkpoint) -> Skeleton:
    config = transformers.AutoConfig.from_pretrained(source.folder)
    del config.quantization_config  # the model as its family builds it
    return Skeleton(config)
