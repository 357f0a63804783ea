"""--mode info: what a checkpoint is made of, what it takes on disk, and how it was made."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from component.modes import shared
from component.modes.parser import Options

if TYPE_CHECKING:
    from component.checkpoint.info import Contents
    from utils.sources import Source

SUMMARY = "Show what a checkpoint is made of, and how it was made."
FLAGS = (
    shared.SUBJECT,
    shared.MODEL_PATH,
    shared.SAVE_PATH,
    shared.PREFIX,
    shared.UNUSED_SEED,
    shared.DEV,
    shared.DTYPE,
)


check = shared.check_subject


def run(options: Options) -> dict[str, Any]:
    """Print tables of the checkpoint at --model_path, and draw its densities; returns the result record."""
    import torch

    from component.checkpoint.choose import find_model, is_compressed
    from component.checkpoint.info import draw, stored_contents, tables_of
    from utils.report import Stopwatch

    watch = Stopwatch(torch.device(options.DEV))
    source = find_model(options.model, options.model_path, Path(options.save_path))
    compressed = is_compressed(source)
    contents = stored_contents(source.location) if compressed else _original(source, options.dtype, options.DEV)
    print(tables_of(source.name, contents))
    picture = Path(options.save_path) / f"{options.prefix}{source.name}-density.png"
    return {
        "mode": "info",
        "command": options.command,
        "model": contents.record.get("model", options.model),
        "dataset": contents.record.get("dataset"),
        "path": source.location if compressed else shared.ORIGINAL,
        "dtype": contents.record.get("dtype", options.dtype),
        "seed": options.seed,
        **contents.summary(),
        **contents.by_linear(),
        "made_by": contents.made_by(),
        "picture": draw(picture, contents.linears, source.name),
        **watch.readings(),
    }


def _original(source: "Source", dtype: str | None, device: str) -> "Contents":
    """Of a model that is not compressed: it has to be loaded, as its file may be of any kind."""
    import torch

    from component.checkpoint.info import dense_contents
    from component.flow.modules import modules_of
    from utils import models
    from utils.layers import describe_layers

    name = dtype or models.default_dtype_name(source, models.load_config(source), torch.device(device))
    model = models.load_model(source, models.DTYPES[name])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    modules = modules_of(model, describe_layers(model))
    return dense_contents(modules, parameters, dtype=name, width=models.DTYPES[name].itemsize)
