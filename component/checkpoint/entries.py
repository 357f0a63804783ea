"""The `layers` of a checkpoint's config: what each decoder linear is stored as."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from component.format.integration import made_of
from component.ranks.budget import Module
from component.ranks.cost import StorageFormat
from component.ranks.sizes import Plan, Rank
from utils.layers import DecoderLayer

Entries = dict[str, dict[str, Any]]  # the `layers` of the quantization config, by the linear's name


def load_layer(layer: nn.Module, described: DecoderLayer, entries: Entries, *, tensors: dict[str, Tensor]) -> None:
    """Turn a copy of a dense layer into the finished one that an earlier run stored."""
    for name in described.linears():
        linear = layer.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        layer.set_submodule(name, made_of(linear, entries[f"{described.name}.{name}"]))
    layer.load_state_dict({name.removeprefix(f"{described.name}."): t for name, t in tensors.items()})
    layer.requires_grad_(False)


def layer_entries(modules: Sequence[Module], plan: Plan) -> Entries:
    """The `layers` of the quantization config; a linear with fewer channels is as if dense (see narrow_entries)."""
    entries: Entries = {}
    for module in modules:
        size = plan[module.name]
        entries[module.name] = {
            "kind": "lowrank" if isinstance(size, Rank) else "dense",
            "rank": size.rank if isinstance(size, Rank) else min(module.d_out, module.d_in),
            "in_features": module.d_in,
            "out_features": module.d_out,
        }
    return entries


def kept_of(entry: dict[str, Any]) -> int | None:
    """The rank of a linear, or its channels that are left; None where all are."""
    names = ("kept_in", "kept_out") if entry["kind"] == "dense" else ("width", "rank")
    return next((entry[name] for name in names if name in entry), None)


def kind_of(entries: Entries) -> str:
    """What --mode m calls a checkpoint: "narrow" where channels are gone and no linear has factors, else "lowrank"."""
    factored = any(entry["kind"] == "lowrank" for entry in entries.values())
    return "narrow" if is_narrow(entries) and not factored else "lowrank"


def paid_for(entries: Entries, storage: StorageFormat) -> str:
    """Name of the form that the density was asked for in: whole channels, or factors in `storage`."""
    return "channels" if kind_of(entries) == "narrow" else storage.name


def is_narrow(entries: Entries) -> bool:
    """Whether any linear has fewer channels than in the dense model."""
    return any(stored_shape(entry) != (entry["out_features"], entry["in_features"]) for entry in entries.values())


def stored_shape(entry: dict[str, Any]) -> tuple[int, int]:
    """(rows, columns) of the matrix that is stored for such an entry, or a dense one."""
    rows, columns = entry["out_features"], entry["in_features"]
    channels = entry.get("heads", 0) * entry.get("width", 0)
    if entry["kind"] == "narrow_out":
        return channels, columns
    if entry["kind"] == "narrow_in":
        return rows, channels
    return entry.get("kept_out", rows), entry.get("kept_in", columns)
