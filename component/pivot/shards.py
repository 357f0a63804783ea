"""--mode pifa: a folder of low-rank factors in, a folder of pivots and coefficients out, shard by shard."""

import copy
import logging
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm

from component.checkpoint import reading as files
from component.checkpoint.counting import densities
from component.checkpoint.entries import kept_of
from component.checkpoint.reading import Checkpoint
from component.checkpoint.writer import CheckpointWriter, check_target
from component.format.integration import FACTORS
from component.format.linear import LowRankLinear, PIFALinear
from component.pivot.fold import Linear, fold, verify
from component.pivot.pivoting import pivot_together
from component.ranks.cost import LOW_RANK, PIVOTED
from utils import models, report
from utils.endings import one_line_endings
from utils.errors import UsageError
from utils.junctions import Junction, LayerProbe, Skeleton
from utils.placement import wake
from utils.whole_files import hash_of

log = logging.getLogger("pifa")

Entries = dict[str, dict[str, Any]]  # the `layers` of the quantization config


@one_line_endings()
def run(options: Namespace) -> dict[str, Any]:
    """Pivot the low-rank checkpoint at --model_path and write `<its folder>-pifa`; returns the result record.

    With --fold, channels that go on to another linear are left in pivot order, and the folder is `<...>-pifa-fold`.
    """
    watch = report.Stopwatch(torch.device(options.DEV))
    source = _source(options)
    dtype = options.dtype or source.record["dtype"]
    folding = options.fold
    folder = Path(options.save_path) / f"{source.folder.resolve().name}-pifa{'-fold' * folding}"
    flags_hash = hash_of({"source": source.manifest, "dtype": dtype, **({"fold": True} if folding else {})})
    check_target(folder, flags_hash, options.resume)
    if record := files.finished_record(folder):
        return record
    with source.verifying() as check, CheckpointWriter(folder, flags_hash, options.resume) as writer:
        return _convert(options, source, check, writer, dtype, watch)


def _convert(
    options: Namespace,
    source: Checkpoint,
    check: Callable[..., None],
    writer: CheckpointWriter,
    dtype: str,
    watch: report.Stopwatch,
) -> dict[str, Any]:
    folder, device, folding = writer.folder, watch.device, options.fold
    skeleton = _skeleton(source) if folding else None
    entries = {name: dict(entry) for name, entry in source.layers.items()}
    wake(device)  # while the source is hashed
    layer_seconds: list[float] = []
    # what has no factors comes first: it is large, and is copied while layers are pivoted
    shards = sorted(source.manifest["shards"], key=lambda shard: (shard != files.REST, shard))
    for shard in tqdm(shards, desc="pivot", unit="shard"):
        before = watch.seconds()
        path, expected = source.folder / shard, source.manifest["shards"][shard]
        if shard == files.REST and dtype == source.record["dtype"]:
            if not writer.finished(shard):
                writer.copy_behind(path, expected, lambda: check(*shards))
            continue
        check(shard)
        tensors = files.open_shard(path)
        here = {name: entry for name, entry in entries.items() if f"{name}.weight" in tensors}
        probe = skeleton.probe_of(here) if skeleton else None
        if writer.finished(shard):
            stored = files.open_shard(folder / shard)
        else:
            stored = pivot_tensors(tensors, here, device, models.DTYPES[dtype], probe)
            if here:
                layer_seconds.append(round(watch.seconds() - before, 3))
            check(*shards)  # the first layer was pivoted meanwhile; nothing is made of a source that is damaged
            writer.write_behind(shard, stored)
        note_entries(here, stored, foldable(probe, here))
    if folding and not any("folded" in entry for entry in entries.values()):
        log.warning("no linear of this model meets the next one channel by channel: nothing was folded")

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
        "layer_seconds": layer_seconds,
        **watch.readings(),
        **densities(folder, entries, ranks_paid_for=storage.name, asked=source.record["density_asked"]),
        "ranks": {name: kept_of(entry) for name, entry in entries.items()},
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
    if source.kind == "narrow":
        raise UsageError(f"{source.folder} has no factors to pivot: --prune flatllm leaves out whole channels")
    if source.kind != "lowrank":
        done = "quantized" if source.kind == "quantized" else "pivoted"
        raise UsageError(f"{source.folder} is {done} already: --mode pifa takes what --mode m wrote")
    return source


def _skeleton(source: Checkpoint) -> Skeleton:
    config = transformers.AutoConfig.from_pretrained(source.folder)
    del config.quantization_config  # the model as its family builds it
    return Skeleton(config)


@torch.no_grad()
def pivot_tensors(
    tensors: dict[str, Tensor],
    entries: Entries,
    device: torch.device,
    dtype: torch.dtype,
    probe: LayerProbe | None = None,
) -> dict[str, Tensor]:
    """A shard's tensors with every low-rank linear pivoted, and folded where a probe is given.

    entries: of the linears whose tensors these are. Raises: RunError as pivoting and folding do.
    """
    junctions = foldable(probe, entries)
    ends = {name for junction in junctions for name in (*junction.producers, junction.consumer)}
    low_rank, dense = {}, {}
    for name, entry in entries.items():
        if entry["kind"] == "lowrank":
            low_rank[name] = _low_rank(tensors, name, device)
        elif name in ends:
            dense[name] = _dense(tensors, name, device)
    after: dict[str, Linear] = {name: copy.deepcopy(layer) for name, layer in dense.items()}
    together = [[name for name in junction.producers if name in low_rank] for junction in junctions]
    alone = [[name] for name in low_rank if not any(name in group for group in together)]
    for group in filter(None, [*together, *alone]):
        chosen = pivot_together([(low_rank[name].u.weight, low_rank[name].v.weight) for name in group], group)
        for name, pivots in zip(group, chosen, strict=True):
            after[name] = PIFALinear.from_pivots(*pivots, low_rank[name].bias, torch.float64)
    for junction in junctions:
        fold(junction, after)
    if probe:
        before: dict[str, Linear] = {**low_rank, **dense}
        for layer in (*before.values(), *after.values()):
            layer.cpu()
        for junction in junctions:
            verify(probe, junction, before, after)
    rest = {key: t for key, t in tensors.items() if not any(key.startswith(f"{name}.") for name in after)}
    changed = {f"{name}.{key}": t for name, layer in after.items() for key, t in layer.state_dict().items()}
    return {key: (t.to(dtype) if t.is_floating_point() else t).cpu() for key, t in (rest | changed).items()}


def foldable(probe: LayerProbe | None, entries: Entries) -> list[Junction]:
    """Those whose linears are all in the entries, with a low-rank one before the joint: only pivots change an order.

    A linear that calibration never called is not in the entries.
    """
    found = probe.junctions if probe else []
    complete = [junction for junction in found if entries.keys() >= {*junction.producers, junction.consumer}]
    return [one for one in complete if any(entries[name]["kind"] in FACTORS for name in one.producers)]


def _low_rank(tensors: dict[str, Tensor], name: str, device: torch.device) -> LowRankLinear:
    u, v = (tensors[f"{name}.{factor}.weight"].to(device) for factor in "uv")  # as stored: float64 is more to move
    return LowRankLinear.from_factors(u, v, tensors.get(f"{name}.bias"), torch.float64)


def _dense(tensors: dict[str, Tensor], name: str, device: torch.device) -> nn.Linear:
    weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device, torch.float64)
    linear.load_state_dict({key: t for key, t in (("weight", weight), ("bias", bias)) if t is not None})
    return linear


def note_entries(entries: Entries, tensors: dict[str, Tensor], junctions: Sequence[Junction]) -> None:
    """Bring the entries in line with the tensors that are stored: kind, rank, and which sides are in pivot order."""
    for name, entry in entries.items():
        if f"{name}.pivot.weight" in tensors:
            entry.update(kind="pifa", rank=len(tensors[f"{name}.pivot.weight"]))
    for junction in junctions:
        if any(entries[name]["kind"] == "pifa" for name in junction.producers):
            in_order = [name for name in junction.producers if _is_identity(tensors.get(f"{name}.perm"))]
            for name, side in [*((name, "outputs") for name in in_order), (junction.consumer, "inputs")]:
                entries[name]["folded"] = sorted({*entries[name].get("folded", ()), side})


def _is_identity(perm: Tensor | None) -> bool:
    return perm is None or torch.equal(perm, torch.arange(len(perm), dtype=perm.dtype))
