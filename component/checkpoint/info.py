"""--mode info: what a checkpoint is made of, by layer and type, what it takes on disk, and how it was made."""

import logging
import math
import re
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import component.format.integration  # noqa: F401  (teaches transformers to load checkpoints)
from component.checkpoint import reading as files
from component.checkpoint.counting import stored_tensors
from component.checkpoint.entries import kept_of
from component.checkpoint.writer import check_target
from component.flow.modules import modules_of
from evaluater import find_model
from utils import models, plots, report
from utils.layers import describe_layers

log = logging.getLogger("pifa")

# of the record of the run that made the checkpoint, in the order in which they are shown
MADE_BY = (
    "command", "model", "revision", "dataset", "windows_sha256", "prune", "reconstruct_step", "allocation",
    "density_asked", "old_output_factor", "pruning_nsamples", "reconstruct_nsamples", "model_seq_len", "seed",
    "quantization",
    "device", "versions", "finished_at",
)  # fmt: skip


@dataclass(frozen=True)
class Linear:
    """One decoder linear as it is stored. numbers, size: stored numbers and bytes.

    rank: or how many channels are left, of each head or of the MLP; None where it is dense.
    """

    name: str
    kind: str
    rank: int | None
    dense_numbers: int
    numbers: int
    size: int

    @property
    def density(self) -> float:
        return self.numbers / self.dense_numbers

    @property
    def place(self) -> tuple[int, str]:
        """(layer, type): the number in its name, and what comes after it."""
        found = re.search(r"\.(\d+)\.(.+)$", self.name)
        return (int(found[1]), found[2]) if found else (0, self.name)


def run(options: Namespace) -> dict[str, Any]:
    """Print tables of the checkpoint at --model_path, and draw its densities; returns the result record."""
    device = torch.device(options.DEV)
    watch = report.Stopwatch(device)
    source = find_model(options)
    compressed = (Path(source.location) / files.MANIFEST).is_file()
    linears, parameters, size, stored = _stored(source.location) if compressed else _original(options, source)
    numbers, dense = sum(one.numbers for one in linears), sum(one.dense_numbers for one in linears)
    summary = {
        "parameters": parameters,
        "parameters_linears": numbers,
        "parameters_linears_dense": dense,
        "density": numbers / dense,
        "density_model": parameters / (parameters - numbers + dense),
        "bytes": size,
        "bytes_linears": sum(one.size for one in linears),
    }
    made = {name: stored[name] for name in MADE_BY if name in stored}
    print(f"{source.name}\n")
    print(report.markdown_table(["what", "value"], [[key, _shown(value)] for key, value in summary.items()]))
    for title, value in (("density", _density), ("rank, channels, or dense", _rank)):
        print(f"\n{title}\n")
        print(by_place(linears, value))
    if made:
        print("\nhow it was made\n")
        print(report.markdown_table(["what", "value"], [[key, _shown(value)] for key, value in made.items()]))
    picture = _draw(Path(options.save_path) / f"{options.prefix}{source.name}-density.png", linears, source.name)
    return {
        "mode": "info",
        "command": options.command,
        "model": stored.get("model", options.model),
        "dataset": stored.get("dataset"),
        "path": source.location if compressed else "original",
        "dtype": stored.get("dtype", options.dtype),
        "seed": options.seed,
        **summary,
        "kinds": {kind: sum(one.kind == kind for one in linears) for kind in sorted({one.kind for one in linears})},
        "ranks": {one.name: one.rank for one in linears},
        "densities": {one.name: one.density for one in linears},
        "made_by": made,
        "picture": picture,
        **watch.readings(),
    }


def _stored(folder: str) -> tuple[list[Linear], int, int, dict[str, Any]]:
    """Linears, numbers and bytes of all tensors, and the record, from the headers of the shards."""
    checkpoint = files.read_checkpoint(folder)
    numbers = dict.fromkeys(checkpoint.layers, 0)
    sizes = dict.fromkeys(checkpoint.layers, 0)
    parameters = size = 0
    for owner, count, stored in stored_tensors(checkpoint.folder, checkpoint.layers):
        parameters, size = parameters + count, size + stored
        if owner is not None:
            numbers[owner] += count
            sizes[owner] += stored
    linears = [
        Linear(
            name,
            entry["kind"],
            kept_of(entry),
            entry["in_features"] * entry["out_features"],
            numbers[name],
            sizes[name],
        )
        for name, entry in checkpoint.layers.items()
    ]
    return linears, parameters, size, checkpoint.record


def _original(options: Namespace, source: models.Source) -> tuple[list[Linear], int, int, dict[str, Any]]:
    """The same of a model that is not compressed: it has to be loaded, as its file may be of any kind."""
    device = torch.device(options.DEV)
    dtype = options.dtype or models.default_dtype_name(source, models.load_config(source), device)
    model = models.load_model(source, models.DTYPES[dtype])
    width = models.DTYPES[dtype].itemsize
    modules = modules_of(model, describe_layers(model))
    linears = [Linear(one.name, "dense", None, one.numbers, one.numbers, one.numbers * width) for one in modules]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return linears, parameters, parameters * width, {"dtype": dtype}


def by_place(linears: Iterable[Linear], value: Callable[[Linear], Any]) -> str:
    """A Markdown table with a row for each layer and a column for each type; `value` gives the cells."""
    layers, types, rows = _grid(linears, value, "")
    return report.markdown_table(["layer", *types], [[layer, *row] for layer, row in zip(layers, rows, strict=True)])


def _grid(linears: Iterable[Linear], value: Callable[[Linear], Any], empty: Any) -> tuple[list[int], list[str], list]:
    """Layers, types, and for each layer a row with a value for each type, `empty` where it has none."""
    cells = {one.place: value(one) for one in linears}
    types = list(dict.fromkeys(kind for _, kind in cells))
    layers = sorted({layer for layer, _ in cells})
    return layers, types, [[cells.get((layer, kind), empty) for kind in types] for layer in layers]


def _density(linear: Linear) -> str:
    return f"{linear.density:.3f}"


def _rank(linear: Linear) -> str:
    return "dense" if linear.rank is None else str(linear.rank)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _draw(path: Path, linears: list[Linear], title: str) -> str | None:
    """The densities as a heat map, layers down, types across; None where the extra for pictures is missing."""
    if not plots.can_plot():
        log.warning("no picture without matplotlib: pip install -r %s", plots.REQUIREMENTS)
        return None
    if path.exists():
        log.warning("%s exists and is left as it is", path)
        return str(path)
    check_target(path, "", False)
    path.parent.mkdir(parents=True, exist_ok=True)
    layers, types, grid = _grid(linears, lambda one: one.density, math.nan)

    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 0.8 * len(types), 2 + 0.2 * len(layers)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid, aspect="auto", vmin=0, vmax=1, cmap="viridis")
    axes.set_xticks(range(len(types)), [kind.rsplit(".", 1)[-1] for kind in types], rotation=45, ha="right")
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers], fontsize="x-small")
    axes.set(title=title, ylabel="layer")
    figure.colorbar(image, label="density")
    figure.savefig(path, dpi=150)
    return str(path)
