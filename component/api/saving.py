"""Write a compressed model that is in memory as a checkpoint folder, which every mode and transformers read."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from component.api.compressing import noted
from component.checkpoint import reading as files
from component.checkpoint.carried import describe_folder, rest_of
from component.checkpoint.counting import densities
from component.checkpoint.entries import Entries, kept_of, kind_of
from component.checkpoint.writer import CheckpointWriter
from component.format.integration import METHOD
from component.ranks.cost import PIVOTED
from utils import report
from utils.errors import UsageError
from utils.layers import DecoderLayer, decoder_layers
from utils.whole_files import hash_of


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> dict[str, Any]:
    """Write the folder; returns its record. Nothing is overwritten.

    The folder is what --mode m or pifa writes: a shard for each layer, config, tokenizer, loader files, hashes, record.

    Raises: UsageError for a model that is not compressed, or a folder that exists or can't be written.
    """
    config: Any = getattr(model.config, "quantization_config", None)
    if getattr(config, "quant_method", None) != METHOD:
        raise UsageError("the model is not compressed: compress_model does that, save_pretrained writes other models")
    entries, folder = config.layers, Path(folder)
    record = record_for(model, entries)
    layers = [DecoderLayer(name, (), frozenset()) for name, _ in decoder_layers(model)]
    with CheckpointWriter(folder, hash_of({**record, "saved": True}), resume=False) as writer:
        for index, layer in enumerate(layers):
            stored = model.get_submodule(layer.name).state_dict()
            writer.write(files.layer_shard(index), {f"{layer.name}.{key}": t for key, t in stored.items()})
        writer.write(files.REST, rest_of(model, layers))
        describe_folder(writer, model, tokenizer, dtype=model.dtype, entries=entries)
        counted = densities(folder, entries, ranks_paid_for=record["ranks_paid_for"], asked=record["density_asked"])
        return writer.seal({**record, **counted, "path": str(folder)})


def record_for(model: PreTrainedModel, entries: Entries) -> dict[str, Any]:
    """What the folder says of how the model came about: all of it, or what its layers tell of one from elsewhere."""
    pivoted, packed = (any(test(entry) for entry in entries.values()) for test in (_is_pivoted, _is_packed))
    elsewhere = {"model": model.config.name_or_path, "use_pifa": True, "density_asked": None}
    return {
        **elsewhere,
        "ranks_paid_for": PIVOTED.name,
        **(noted(model) or {}),
        "mode": "quantize" if packed else "pifa" if pivoted else "m",
        "kind": "quantized" if packed else "pifa" if pivoted else kind_of(entries),
        "command": "save_model",
        "dtype": str(model.dtype).removeprefix("torch."),
        "ranks": {name: kept_of(entry) for name, entry in entries.items()},
        "versions": report.versions(),
    }


def _is_pivoted(entry: dict[str, Any]) -> bool:
    return entry["kind"] == "pifa"


def _is_packed(entry: dict[str, Any]) -> bool:
    return "bits" in entry
