"""--mode export: a checkpoint as the dense model that it computes, for tools that do not know the format."""

from pathlib import Path
from typing import Any

from component.checkpoint.names import FORMATS
from component.modes import shared
from component.modes.parser import Flag, Options

SUMMARY = "Write a checkpoint as a dense model, as a folder or as GGUF."
FLAGS = (
    shared.SUBJECT,
    shared.MODEL_PATH,
    shared.SAVE_PATH,
    shared.PREFIX,
    Flag(
        "format", "Dense transformers folder, or one GGUF file.", "export", default="transformers", choices=FORMATS
    ),
    shared.DTYPE,
    shared.UNUSED_SEED,
)  # fmt: skip


check = shared.check_subject


def run(options: Options) -> dict[str, Any]:
    """Write `<name>-dense/` or `<name>.gguf` under --save_path; returns the result record."""
    import torch

    from component.checkpoint.choose import find_model
    from component.checkpoint.export import export
    from utils.report import Stopwatch

    watch = Stopwatch(torch.device("cpu"))
    source = find_model(options.model, options.model_path, Path(options.save_path))
    as_gguf = options.format == "gguf"
    name = options.prefix + source.name
    target = Path(options.save_path) / (f"{name}.gguf" if as_gguf else f"{name}-dense")
    written = export(source, target, name=name, as_gguf=as_gguf, dtype=options.dtype)
    return {
        "mode": "export",
        "command": options.command,
        "model": written.record.get("model", options.model),
        "dataset": written.record.get("dataset"),
        "source": source.location,
        "path": str(target),
        "format": options.format,
        "dtype": written.dtype,
        "seed": options.seed,
        "density": 1.0,
        "bytes": written.size,
        **watch.readings(),
    }
