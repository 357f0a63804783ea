"""The engine of --mode quantize: the factors of a checkpoint as integers of 4 or 8 bits, by GPTQ or to nearest.

Embeddings, norms and head stay as they are. quantize/walk.py walks the layers, gptq.py and quantize/product.py round.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from component.checkpoint.choose import find_checkpoint, model_in
from component.checkpoint.counting import count_numbers
from component.checkpoint.derive import Derivation
from component.checkpoint.entries import Entries, is_narrow
from component.checkpoint.reading import Checkpoint
from component.checkpoint.writer import CheckpointWriter
from component.quantize import packing
from component.quantize.forms import MATRIX, WIDE, WIDE_OUTER
from component.quantize.gptq import Grid
from component.quantize.settings import Settings
from component.quantize.walk import Rounding, Walk, forms_of, quantize_model
from utils import data, models, report
from utils.endings import one_line_endings
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
def quantize_folder(settings: Settings) -> dict[str, Any]:
    """Quantize a checkpoint into `<its name>-<method><bits>`; returns the result record.

    Raises: UsageError for a model without factors, one that is quantized already, or settings that can't be met;
    RunError where moments are not finite, or scales are beyond float16.
    """
    watch = report.Stopwatch(torch.device(settings.request.device))
    packing.check_installed()
    source = find_checkpoint(
        settings.request.model_path,
        settings.request.save_path,
        passed_over=("quantize",),
        no_original="--mode quantize takes factors, which the original model has not: run --mode m first",
        refusal=_refusal,
    )
    calibration = _calibration(settings, source) if settings.calibrated else None
    quantization = settings.as_json() | (calibration.as_json() if calibration else {})
    suffix = f"-{settings.method}{settings.bits}"
    new = Derivation(request=settings.request, source=source, suffix=suffix, decisive=quantization)
    if record := new.finished():
        return record
    source.verify()

    with new.writer() as writer:
        settled, entries = _write_layers(new, settings, calibration, writer=writer, device=watch.device)
        writer.describe(new.config(entries), new.files_beside())
        counts = count_numbers(new.folder, entries)
        own = {
            "kind": "quantized",
            "quantization": {**quantization, **settled},
            "bits": settings.bits,
            "density": counts.density,
            "density_model": counts.density_model,
            "linear_bytes": counts.linear_bytes,
            "linear_mib": round(counts.linear_bytes / 2**20, 3),
            # of every weight of the dense linears, factors, scales, zeros and index included
            "bits_per_weight": round(8 * counts.linear_bytes / counts.dense_linears, 4),
        }
        return writer.seal(new.record("quantize", watch, own))


def _write_layers(
    new: Derivation,
    settings: Settings,
    calibration: Calibration | None,
    *,
    writer: CheckpointWriter,
    device: torch.device,
) -> tuple[dict[str, Any], Entries]:
    """Write all shards: what was settled before the first one, and the entries of the config."""
    stored = models.DTYPES[new.dtype]
    computed = torch.float32 if device.type == "cpu" else stored  # half precision is several times slower there
    model: Any = models.load_model(model_in(new.source), computed)
    walk = Walk(
        model=model,
        described=describe_layers(model),
        windows=calibration.windows if calibration else None,
        device=device,
        shelf=Shelf.of(settings.host_memory, new.folder.parent),
    )
    grid = Grid(settings.bits, settings.group_size, settings.act_order)
    rounding = Rounding(
        grid=grid,
        mix_ratio=settings.old_output_factor,
        drift_ratio=settings.drift_factor,
        share=settings.integer_share,
    )
    settled = writer.settled
    if settled is None:
        settled = {"forms": {}}
        if calibration and rounding.share:
            settled["forms"] = forms_of(walk, new.source.layers, rounding)
        writer.settle(settled)
    entries = entries_of(new.source, settled["forms"], grid)
    quantize_model(walk, entries, rounding, writer=writer, dtype=stored)
    return settled, entries


def entries_of(source: Checkpoint, forms: Mapping[str, str], grid: Grid) -> Entries:
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


def _refusal(source: Checkpoint) -> str | None:
    if source.kind == "quantized":
        return f"{source.folder} is quantized already: --mode quantize takes {source.record['source']}"
    if is_narrow(source.layers):
        return (
            f"{source.folder} has linears with fewer channels (--prune flatllm or auto), and --mode quantize packs none"
        )
    if all(entry["kind"] == "dense" for entry in source.layers.values()):
        return f"{source.folder} has no factors to quantize: all its linears are dense"
    return None


def _calibration(settings: Settings, source: Checkpoint) -> Calibration:
    tokenizer = models.load_tokenizer(model_in(source))
    dataset, windows, _ = data.calibration_windows(
        tokenizer,
        settings.dataset,
        count=settings.reconstruct_nsamples,
        length=settings.model_seq_len,
        seed=settings.seed,
        held_out=settings.heldout_nsamples,
    )
    return Calibration(windows, dataset)
