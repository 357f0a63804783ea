"""Write a compressed model that is in memory as a checkpoint folder, which every mode and transformers read."""

import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from component.api.compressing import noted
from component.checkpoint import reading as files
from component.checkpoint.carried import files_beside, folder_config, rest_of
from component.checkpoint.counting import densities
from component.checkpoint.entries import kept_of
from component.checkpoint.writer import CheckpointWriter
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
    config = getattr(model.config, "quantization_config", None)
    record = noted(model)
    if config is None or record is None:
        raise UsageError("the model is not compressed: compress_model does that, save_pretrained writes other models")
    entries, folder = config.layers, Path(folder)
    layers = [DecoderLayer(name, (), frozenset()) for name, _ in decoder_layers(model)]
    asked = record["density_asked"]
    with CheckpointWriter(folder, hash_of({**record, "saved": True}), resume=False) as writer:
        for index, layer in enumerate(layers):
            stored = model.get_submodule(layer.name).state_dict()
            writer.write(files.layer_shard(index), {f"{layer.name}.{key}": t for key, t in stored.items()})
        writer.write(files.REST, rest_of(model, layers))
        with tempfile.TemporaryDirectory() as temporary:
            beside = files_beside(Path(temporary), model, tokenizer)
            writer.describe(folder_config(model, model.dtype, entries), beside)
        return writer.seal(
            {
                **record,
                "mode": "pifa" if record["kind"] == "pifa" else "m",
                "command": "save_model",
                "path": str(folder),
                "dtype": str(model.dtype).removeprefix("torch."),
                **densities(folder, entries, ranks_paid_for=record.get("ranks_paid_for", PIVOTED.name), asked=asked),
                "ranks": {name: kept_of(entry) for name, entry in entries.items()},
                "versions": report.versions(),
            }
        )
