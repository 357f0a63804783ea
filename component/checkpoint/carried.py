"""What a checkpoint folder carries beside its layers: the rest of the model, config, tokenizer, loader."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from component.checkpoint.entries import Entries
from component.checkpoint.writer import CheckpointWriter
from component.format import integration
from component.format.integration import FORMAT_VERSION, METHOD
from utils.layers import DecoderLayer
from utils.whole_files import write_json


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


def folder_config(model: PreTrainedModel, dtype: torch.dtype, entries: Entries) -> dict[str, Any]:
    """config.json: the family's own, plus the format and the file that loads it where this package is absent."""
    config = json.loads(model.config.to_json_string(use_diff=True))
    config.pop("_name_or_path", None)
    config["architectures"] = [type(model).__name__]
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    config["auto_map"] = {"AutoConfig": "integration.AutoConfigWithPIFA"}
    config["quantization_config"] = {"quant_method": METHOD, "format_version": FORMAT_VERSION, "layers": entries}
    return config


def describe_folder(
    writer: CheckpointWriter,
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    dtype: torch.dtype,
    entries: Entries,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write what stands beside the shards, once all are there: index, config, tokenizer, loader files.

    more: name -> content of other JSON files.
    """
    with tempfile.TemporaryDirectory() as temporary:
        for name, content in (more or {}).items():
            write_json(Path(temporary) / name, content)
        beside = files_beside(Path(temporary), model, tokenizer)
        writer.describe(folder_config(model, dtype, entries), beside)


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
