"""The model that a mode judges, and what its record starts with."""

from pathlib import Path
from typing import Any

import torch

from component.checkpoint.choose import find_model, is_compressed
from component.checkpoint.names import ORIGINAL
from component.checkpoint.reading import read_checkpoint
from component.modes.parser import Options
from utils import models, report
from utils.sources import Source


def record_of(source: Source) -> dict[str, Any]:
    """What made the checkpoint; of an original model nothing."""
    return read_checkpoint(source.location).record if is_compressed(source) else {}


def find_subject(options: Options) -> tuple[Source, Any]:
    """The model that the flags name, and its tokenizer. Raises: UsageError where there is none, or it is damaged."""
    source = find_model(options.model, options.model_path, Path(options.save_path))
    return source, models.load_tokenizer(source)


def load_judged(source: Source, options: Options) -> tuple[Any, report.Stopwatch, dict[str, Any]]:
    """The model on its device, a running stopwatch, and what every record of a judged model starts with.

    Its dtype is --dtype, else that of the checkpoint, else what suits the device.
    """
    device = torch.device(options.DEV)
    watch = report.Stopwatch(device)
    stored = record_of(source)
    default = stored.get("dtype") or models.default_dtype_name(source, models.load_config(source), device)
    dtype = options.dtype or default
    loaded: Any = models.load_model(source, models.DTYPES[dtype])
    record = {
        "command": options.command,
        "model": stored.get("model", options.model),
        "dataset": stored.get("dataset"),
        "path": source.location if is_compressed(source) else ORIGINAL,
        "dtype": dtype,
        "seed": options.seed,
        "density": stored.get("density", 1.0),
        "density_model": stored.get("density_model", 1.0),
        "device": report.device_name(device),
    }
    return loaded.to(device), watch, record
