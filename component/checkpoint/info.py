"""What a checkpoint is made of, by layer and type, what it takes on disk, and how it was made."""

import logging
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from component.checkpoint.counting import stored_tensors
from component.checkpoint.entries import kept_of
from component.checkpoint.reading import read_checkpoint
from component.checkpoint.writer import check_target
from component.ranks.budget import Module
from utils import plots, report

log = logging.getLogger("pifa")

# of the record of the run that made the checkpoint, in the order in which they are shown
MADE_BY = (
    "command", "model", "revision", "dataset", "windows_sha256", "prune", "reconstruct_step", "allocation",
    "density_asked", "old_output_factor", "pruning_nsamples", "reconstruct_nsamples", "model_seq_len", "seed",
    "quantization",
    "device", "versions", "finished_at",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StoredLinear:
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


class Contents(NamedTuple):
    """parameters, size: numbers and bytes of all tensors; record: that of the run that made them, or what is known."""

    linears: list[StoredLinear]
    parameters: int
    size: int
    record: dict[str, Any]

    def summary(self) -> dict[str, Any]:
        """Counts and densities, as the result record has them."""
        numbers, dense = sum(one.numbers for one in self.linears), sum(one.dense_numbers for one in self.linears)
        return {
            "parameters": self.parameters,
            "parameters_linears": numbers,
            "parameters_linears_dense": dense,
            "density": numbers / dense,
            "density_model": self.parameters / (self.parameters - numbers + dense),
            "bytes": self.size,
            "bytes_linears": sum(one.size for one in self.linears),
        }

    def made_by(self) -> dict[str, Any]:
        """What is shown of the record."""
        return {name: self.record[name] for name in MADE_BY if name in self.record}

    def by_linear(self) -> dict[str, Any]:
        """Kinds, ranks and densities, as the result record has them."""
        kinds = sorted({one.kind for one in self.linears})
        return {
            "kinds": {kind: sum(one.kind == kind for one in self.linears) for kind in kinds},
            "ranks": {one.name: one.rank for one in self.linears},
            "densities": {one.name: one.density for one in self.linears},
        }


def stored_contents(folder: str) -> Contents:
    """Of a compressed folder, from the headers of its shards."""
    checkpoint = read_checkpoint(folder)
    numbers = dict.fromkeys(checkpoint.layers, 0)
    sizes = dict.fromkeys(checkpoint.layers, 0)
    parameters = size = 0
    for owner, count, stored in stored_tensors(checkpoint.folder, checkpoint.layers):
        parameters, size = parameters + count, size + stored
        if owner is not None:
            numbers[owner] += count
            sizes[owner] += stored
    linears = [
        StoredLinear(
            name=name,
            kind=entry["kind"],
            rank=kept_of(entry),
            dense_numbers=entry["in_features"] * entry["out_features"],
            numbers=numbers[name],
            size=sizes[name],
        )
        for name, entry in checkpoint.layers.items()
    ]
    return Contents(linears=linears, parameters=parameters, size=size, record=checkpoint.record)


def dense_contents(modules: Iterable[Module], parameters: int, *, dtype: str, width: int) -> Contents:
    """Of a model that is not compressed. modules: its decoder linears; parameters: of all; width: bytes of a number."""
    linears = [
        StoredLinear(
            name=module.name,
            kind="dense",
            rank=None,
            dense_numbers=module.numbers,
            numbers=module.numbers,
            size=module.numbers * width,
        )
        for module in modules
    ]
    return Contents(linears=linears, parameters=parameters, size=parameters * width, record={"dtype": dtype})


def tables_of(name: str, contents: Contents) -> str:
    """Markdown: the summary, densities and ranks by place, how it was made."""
    parts = [f"{name}\n", _two_columns(contents.summary())]
    for title, value in (("density", _density), ("rank, channels, or dense", _rank)):
        parts += [f"\n{title}\n", by_place(contents.linears, value)]
    if made := contents.made_by():
        parts += ["\nhow it was made\n", _two_columns(made)]
    return "\n".join(parts)


def _two_columns(values: dict[str, Any]) -> str:
    return report.markdown_table(["what", "value"], [[key, _shown(value)] for key, value in values.items()])


def by_place(linears: Iterable[StoredLinear], value: Callable[[StoredLinear], Any]) -> str:
    """A Markdown table with a row for each layer and a column for each type; `value` gives the cells."""
    layers, types, rows = _grid(linears, value, "")
    return report.markdown_table(["layer", *types], [[layer, *row] for layer, row in zip(layers, rows, strict=True)])


def _grid(
    linears: Iterable[StoredLinear], value: Callable[[StoredLinear], Any], empty: Any
) -> tuple[list[int], list[str], list]:
    """Layers, types, and for each layer a row with a value for each type, `empty` where it has none."""
    cells = {one.place: value(one) for one in linears}
    types = list(dict.fromkeys(kind for _, kind in cells))
    layers = sorted({layer for layer, _ in cells})
    return layers, types, [[cells.get((layer, kind), empty) for kind in types] for layer in layers]


def _density(linear: StoredLinear) -> str:
    return f"{linear.density:.3f}"


def _rank(linear: StoredLinear) -> str:
    return "dense" if linear.rank is None else str(linear.rank)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def draw(path: Path, linears: list[StoredLinear], title: str) -> str | None:
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
