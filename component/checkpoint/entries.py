"""What a low-rank checkpoint folder holds: tensors of its shards, config, files beside them; and its densities."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from component.checkpoint.counting import count_numbers
from component.format import integration
from component.format.integration import FORMAT_VERSION, METHOD, made_of
from component.ranks.budget import Module, Plan
from component.ranks.cost import PIVOTED, StorageFormat
from utils.layers import DecoderLayer


def load_layer(
    layer: nn.Module, described: DecoderLayer, entries: dict[str, dict[str, Any]], tensors: dict[str, Tensor]
) -> None:
    """Turn a copy of a dense layer into the finished one that an earlier run stored."""
    for name in described.linears():
        linear = layer.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        layer.set_submodule(name, made_of(linear, entries[f"{described.name}.{name}"]))
    layer.load_state_dict({name.removeprefix(f"{described.name}."): t for name, t in tensors.items()})
    layer.requires_grad_(False)


def rest_of(model: nn.Module, described: list[DecoderLayer]) -> dict[str, Tensor]:
    """Embeddings, norms and head; a weight tied to another is stored once."""
    layers = tuple(f"{layer.name}." for layer in described)
    kept: dict[str, Tensor] = {}
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(layers)}
    for name in sorted(tensors, key=lambda name: (name in tied, name)):
        if not any(tensors[name].data_ptr() == tensor.data_ptr() for tensor in kept.values()):
            kept[name] = tensors[name]
    return kept


def layer_entries(modules: Sequence[Module], plan: Plan) -> dict[str, dict[str, Any]]:
    """The `layers` of the quantization config."""
    entries: dict[str, dict[str, Any]] = {}
    for module in modules:
        rank = plan[module.name]
        entries[module.name] = {
            "kind": "dense" if rank is None else "lowrank",
            "rank": min(module.d_out, module.d_in) if rank is None else rank,
            "in_features": module.d_in,
            "out_features": module.d_out,
        }
    return entries


def folder_config(model: PreTrainedModel, dtype: torch.dtype, entries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """config.json: the family's own, plus the format and the file that loads it where this package is absent."""
    config = json.loads(model.config.to_json_string(use_diff=True))
    config.pop("_name_or_path", None)
    config["architectures"] = [type(model).__name__]
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    config["auto_map"] = {"AutoConfig": "integration.AutoConfigWithPIFA"}
    config["quantization_config"] = {"quant_method": METHOD, "format_version": FORMAT_VERSION, "layers": entries}
    return config


def files_beside(folder: Path, model: PreTrainedModel, tokenizer) -> list[Path]:
    """Tokenizer, generation config and the loader, as files to copy."""
    tokenizer.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    return sorted(path for path in folder.iterdir() if path.is_file()) + loader_files()


def loader_files() -> list[Path]:
    """What a checkpoint carries so that transformers can load it where this package is absent."""
    travels = Path(integration.__file__).parent
    return sorted(path for path in travels.glob("*.py") if path.name != "__init__.py")


def kept_of(entry: dict[str, Any]) -> int | None:
    """The rank of a linear, or its channels that are left; None where all are."""
    names = ("kept_in", "kept_out") if entry["kind"] == "dense" else ("width", "rank")
    return next((entry[name] for name in names if name in entry), None)


def kind_of(entries: dict[str, dict[str, Any]]) -> str:
    """What --mode m calls a checkpoint: "narrow" where channels are gone and no linear has factors, else "lowrank"."""
    factored = any(entry["kind"] == "lowrank" for entry in entries.values())
    return "narrow" if is_narrow(entries) and not factored else "lowrank"


def is_narrow(entries: dict[str, dict[str, Any]]) -> bool:
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


def stored_as(entry: dict[str, Any], storage: StorageFormat) -> int:
    """Numbers that a linear stores, or would store if its factors were in this form."""
    if entry["kind"] in ("lowrank", "pifa"):
        return storage.stored(entry["rank"], entry["out_features"], entry["in_features"])
    return math.prod(stored_shape(entry))


def densities(folder: Path, entries: dict[str, dict[str, Any]], ranks_paid_for: str, asked: float) -> dict[str, Any]:
    """The densities of a record, counted from the tensors on disk; density_pivoted from the ranks.

    ranks_paid_for: the form of storage whose density was asked for.
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
