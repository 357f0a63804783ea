"""The model that a mode judges, and what its record starts with."""

from pathlib import Path
from typing import Any

import torch

import component.format.integration  # noqa: F401  (teaches transformers to load checkpoints)
from component.checkpoint.reading import MANIFEST, read_checkpoint
from utils import models, report
from utils.sources import Source


def is_compressed(source: Source) -> bool:
    return (Path(source.location) / MANIFEST).is_file()


def record_of(source: Source) -> dict[str, Any]:
    """What made the checkpoint; of an original model nothing."""
    return read_checkpoint(source.location).record if is_compressed(source) else {}


def load_judged(
    source: Source, *, model: str, device: str, dtype: str | None, seed: int, command: str
) -> tuple[Any, report.Stopwatch, dict[str, Any]]:
    """The model on its device, a running stopwatch, and what every record of a judged model starts with.

    model, command: as the record quotes them; dtype: None for that of the checkpoint, or what suits the device.
    """
    place = torch.device(device)
    watch = report.Stopwatch(place)
    stored = record_of(source)
    default = stored.get("dtype") or models.default_dtype_name(source, models.load_config(source), place)
    name = dtype or default
    loaded: Any = models.load_model(source, models.DTYPES[name])
    return (
        loaded.to(place),
        watch,
        {
            "command": command,
            "model": stored.get("model", model),
            "dataset": stored.get("dataset"),
            "path": source.location if is_compressed(source) else "original",
            "dtype": name,
            "seed": seed,
            "density": stored.get("density", 1.0),
            "density_model": stored.get("density_model", 1.0),
            "device": report.device_name(place),
        },
    )
