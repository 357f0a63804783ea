"""--mode pifa: a folder of low-rank factors in, a folder of pivots and coefficients out, shard by shard."""

import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from component.compress import densities
from component.cost import LOW_RANK, PIVOTED
from component.linear import PIFALinear
from component.pivoting import pivot
from utils import checkpoint as files
from utils import models, report
from utils.checkpoint import Checkpoint, CheckpointWriter
from utils.errors import UsageError

log = logging.getLogger("pifa")


def run(options: Namespace) -> dict[str, Any]:
    """Pivot the low-rank checkpoint at --model_path and write `<its folder>-pifa`; returns the result record."""
    device = torch.device(options.DEV)
    watch = report.Stopwatch(device)
    source = _source(options)
    dtype = options.dtype or source.record["dtype"]
    folder = Path(options.save_path) / f"{source.folder.resolve().name}-pifa"
    flags_hash = files.hash_of({"source": source.manifest, "dtype": dtype})
    files.check_target(folder, flags_hash, options.resume)
    if folder.exists() and files.is_finished(folder):
        log.warning("%s is finished already", folder)
        return files.read_checkpoint(folder).record
    source.verify()

    writer = CheckpointWriter(folder, flags_hash, options.resume)
    entries = {name: dict(entry) for name, entry in source.layers.items()}
    for shard in tqdm(sorted(source.manifest["shards"]), desc="pivot", unit="shard"):
        if writer.finished(shard):
            _read_ranks(entries, files.open_shard(folder / shard))
            continue
        tensors = files.open_shard(source.folder / shard)
        writer.write(shard, pivot_tensors(tensors, entries, device, models.DTYPES[dtype]))

    config = {**source.config, "dtype": dtype}
    config["quantization_config"] = {**source.config["quantization_config"], "layers": entries}
    written = set(source.manifest["shards"]) | {files.MANIFEST, files.RECORD, files.INDEX, "config.json"}
    beside = [path for path in source.folder.iterdir() if path.is_file() and path.name not in written]
    writer.describe(config, sorted(path for path in beside if not path.name.startswith(".")))
    storage = PIVOTED if source.record["use_pifa"] else LOW_RANK
    record = {
        **source.record,
        "mode": "pifa",
        "kind": "pifa",
        "command": options.command,
        "source": str(source.folder),
        "path": str(folder),
        "dtype": dtype,
        **watch.readings(),
        **densities(folder, entries, storage, source.record["density_asked"]),
        "ranks": {name: None if entry["kind"] == "dense" else entry["rank"] for name, entry in entries.items()},
        "device": report.device_name(device),
        "versions": report.versions(),
    }
    return writer.seal(record)


def _source(options: Namespace) -> Checkpoint:
    if options.model_path is None:
        return files.newest_checkpoint(Path(options.save_path), "lowrank")
    if options.model_path == "original":
        raise UsageError("--mode pifa needs a low-rank checkpoint, not the original model: run --mode m first")
    source = files.read_checkpoint(options.model_path)
    if source.kind != "lowrank":
        raise UsageError(f"{source.folder} is pivoted already: --mode pifa takes what --mode m wrote")
    return source


def pivot_tensors(
    tensors: dict[str, Tensor], entries: dict[str, dict[str, Any]], device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """A shard's tensors with every low-rank layer pivoted; notes kind and rank of each in `entries`."""
    result = dict(tensors)
    for name, entry in entries.items():
        if entry["kind"] != "lowrank" or f"{name}.u.weight" not in tensors:
            continue
        u, v = (result.pop(f"{name}.{factor}.weight").to(device) for factor in ("u", "v"))
        bias = result.pop(f"{name}.bias", None)
        pivots = pivot(u, v, name)
        layer = PIFALinear.from_pivots(*pivots, bias, dtype)
        entry.update(kind="pifa", rank=layer.rank)
        result.update({f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()})
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in result.items()}


def _read_ranks(entries: dict[str, dict[str, Any]], tensors: dict[str, Tensor]) -> None:
    """Note kind and rank of the layers of a shard that an earlier run pivoted."""
    for name, entry in entries.items():
        if f"{name}.pivot.weight" in tensors:
            entry.update(kind="pifa", rank=tensors[f"{name}.pivot.weight"].shape[0])
