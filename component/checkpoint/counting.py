"""Numbers, bytes and densities of a checkpoint folder, counted from the headers of its shards."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from component.checkpoint.entries import stored_shape
from component.checkpoint.reading import INDEX
from component.ranks.cost import PIVOTED, StorageFormat

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
    return Counts(linears=linears, dense_linears=dense, model=model, linear_bytes=size)


def stored_as(entry: dict[str, Any], storage: StorageFormat) -> int:
    """Numbers that a linear stores, or would store if its factors were in this form."""
    if entry["kind"] in ("lowrank", "pifa"):
        return storage.stored(entry["rank"], entry["out_features"], entry["in_features"])
    return math.prod(stored_shape(entry))


def densities(
    folder: Path, entries: dict[str, dict[str, Any]], *, ranks_paid_for: str, asked: float | None
) -> dict[str, Any]:
    """The densities of a record, counted from the tensors on disk; density_pivoted from the ranks.

    ranks_paid_for: the form of storage whose density was asked for; asked: that density, None where it is not known.
    """
    counts = count_numbers(folder, entries)
    pivoted = sum(stored_as(entry, PIVOTED) for entry in entries.values())
    return {
        "density": counts.density,
        "density_asked": asked,
        "density_pivoted": pivoted / counts.dense_linears,
        "density_model": counts.density_model,
        "linear_mib": round(counts.linear_bytes / 2**20, 3),
        "ranks_paid_for": ranks_paid_for,
    }
