"""--mode quantize: the factors of a checkpoint as integers of 4 or 8 bits, by GPTQ or rounding to nearest.

Embeddings, norms and head stay as they are. quantize/walk.py walks the layers, gptq.py and quantize/product.py round.
"""

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from component.checkpoint import reading as files
from component.checkpoint.carried import loader_files
from component.checkpoint.counting import count_numbers
from component.checkpoint.entries import is_narrow
from component.checkpoint.reading import Checkpoint
from component.checkpoint.writer import CheckpointWriter, check_target
from component.quantize import packing
from component.quantize.forms import MATRIX, WIDE, WIDE_OUTER
from component.quantize.gptq import Grid
from component.quantize.walk import Recipe, forms_of, quantize_model
from utils import data, models, report
from utils.endings import one_line_endings
from utils.errors import UsageError
from utils.layers import describe_layers
from utils.placement import Shelf
from utils.whole_files import hash_of


class Calibration(NamedTuple):
    """windows: (count, length) int64; dataset: the name of the text that they are from."""

    windows: Tensor
    dataset: str

    def as_json(self) -> dict[str, Any]:
        count, length = self.windows.shape
        hashed = hash_of(self.windows.tolist())
        return {"dataset": self.dataset, "windows": count, "model_seq_len": length, "windows_sha256": hashed}


@one_line_endings()
def run(options: Namespace) -> dict[str, Any]:
    """Quantize the checkpoint at --model_path into `<its name>-<method><bits>`; returns the result record.

    Raises: UsageError for a model without factors, one that is quantized already, or flags that can't be met;
    RunError where moments are not finite, or scales are beyond float16.
    """
    watch = report.Stopwatch(torch.device(options.DEV))
    packing.check_installed()
    source = find_factors(options)
    grid = Grid(options.bits, options.group_size, options.act_order)
    recipe = Recipe(grid, options.old_output_factor, options.drift_factor, options.integer_share)
    calibration = _calibration(options, source) if options.quantize_method == "gptq" else None
    dtype = options.dtype or source.record["dtype"]
    quantization = {"method": options.quantize_method, "bits": grid.bits, "group_size": grid.group_size}
    if calibration:
        quantization |= {**recipe.as_json(), **calibration.as_json()}
    flags_hash = hash_of({"source": source.manifest, "dtype": dtype, **quantization})
    name = f"{options.prefix}{source.folder.resolve().name}-{options.quantize_method}{grid.bits}"
    folder = Path(options.save_path) / name
    check_target(folder, flags_hash, options.resume)
    if record := files.finished_record(folder):
        return record
    source.verify()

    with CheckpointWriter(folder, flags_hash, options.resume) as writer:
        stored = models.DTYPES[dtype]
        computed = (
            torch.float32 if watch.device.type == "cpu" else stored
        )  # half precision is several times slower there
        model: Any = models.load_model(models.Source(source.folder.name, str(source.folder)), computed)
        limit = options.host_memory
        shelf = Shelf(None if limit is None else int(limit * report.GIB), folder.parent)
        windows = calibration.windows if calibration else None
        described = describe_layers(model)
        settled = writer.settled
        if settled is None:
            settled = {"forms": {}}
            if windows is not None and recipe.share:
                settled["forms"] = forms_of(model, described, source.layers, recipe, windows, watch.device, shelf)
            writer.settle(settled)
        entries = entries_of(source, settled["forms"], grid)
        quantize_model(model, described, entries, recipe, windows, writer, watch.device, stored, shelf)
        config = {**source.config, "dtype": dtype}
        config["quantization_config"] = {**source.config["quantization_config"], "layers": entries}
        writer.describe(config, _files_beside(source))
        counts = count_numbers(folder, entries)
        return writer.seal(
            {
                **source.record,
                "mode": "quantize",
                "kind": "quantized",
                "command": options.command,
                "source": str(source.folder),
                "path": str(folder),
                "dtype": dtype,
                "quantization": {**quantization, **settled},
                "bits": grid.bits,
                "density": counts.density,
                "density_model": counts.density_model,
                "linear_bytes": counts.linear_bytes,
                "linear_mib": round(counts.linear_bytes / 2**20, 3),
                # of every weight of the dense linears, factors, scales, zeros and index included
                "bits_per_weight": round(8 * counts.linear_bytes / counts.dense_linears, 4),
                **watch.readings(),
                "device": report.device_name(watch.device),
                "versions": report.versions(),
            }
        )


def entries_of(source: Checkpoint, forms: Mapping[str, str], grid: Grid) -> dict[str, dict[str, Any]]:
    """`layers` of the quantization config. forms: kinds of forms.py, by linear; factors where it says nothing."""
    entries = {}
    for name, entry in source.layers.items():
        form = forms.get(name)
        if form == MATRIX:
            entry = {"kind": "dense", **{side: entry[side] for side in ("in_features", "out_features")}}
        entries[name] = {**entry, "bits": grid.bits, "group_size": grid.group_size}
        if form == WIDE_OUTER:
            entries[name]["outer_bits"] = WIDE
    return entries


def find_factors(options: Namespace) -> Checkpoint:
    """What --model_path names; without it the newest one under --save_path, or what that was quantized from.

    Raises: UsageError where there is none, or it has nothing to quantize.
    """
    if options.model_path == "original":
        raise UsageError("--mode quantize takes factors, which the original model has not: run --mode m first")
    if options.model_path is None:
        source = files.newest_checkpoint(Path(options.save_path), None)
        while source.kind == "quantized":
            source = files.read_checkpoint(source.record["source"])
    else:
        source = files.read_checkpoint(options.model_path)
    if source.kind == "quantized":
        raise UsageError(f"{source.folder} is quantized already: --mode quantize takes {source.record['source']}")
    if is_narrow(source.layers):
        raise UsageError(
            f"{source.folder} has linears with fewer channels (--prune flatllm or auto), and --mode quantize packs none"
        )
    if all(entry["kind"] == "dense" for entry in source.layers.values()):
        raise UsageError(f"{source.folder} has no factors to quantize: all its linears are dense")
    return source


def _calibration(options: Namespace, source: Checkpoint) -> Calibration:
    tokenizer = models.load_tokenizer(models.Source(source.folder.name, str(source.folder)))
    text = data.read_text(options.dataset[0] if options.dataset else None, "train")
    length = options.model_seq_len
    before, _ = data.hold_out(data.tokenize(tokenizer, text.text), options.heldout_nsamples, length)
    return Calibration(data.random_windows(before, options.reconstruct_nsamples, length, options.seed), text.name)


def _files_beside(source: Checkpoint) -> list[Path]:
    """Tokenizer and the like from the source; what loads the folder as it is today."""
    loader = loader_files()
    made = {*source.manifest["shards"], files.MANIFEST, files.RECORD, files.INDEX, "config.json"}
    made |= {path.name for path in loader}
    found = sorted(path for path in source.folder.iterdir() if path.is_file() and path.name not in made)
    return [path for path in found if not path.name.startswith(".")] + loader
