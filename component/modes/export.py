"""--mode export: a checkpoint as the dense model that it computes, for tools that do not know the format."""

from dataclasses import replace
from typing import Any

from component.checkpoint.names import FORMATS
from component.modes import shared
from component.modes.parser import Flag, Options

SUMMARY = "Write a checkpoint as a dense model, as a folder or as GGUF."
FLAGS = (
    shared.MODEL,
    shared.MODEL_PATH,
    shared.SAVE_PATH,
    shared.PREFIX,
    Flag(
        "format", "Dense transformers folder, or one GGUF file.", "export", default="transformers", choices=FORMATS
    ),
    shared.DTYPE,
    replace(shared.SEED, help="Seed that the record names; nothing is drawn.", group=shared.MACHINE),
)  # fmt: skip


def check(options: Options) -> None:
    """Raises: UsageError for a model that is not there."""
    shared.check_subject(options)


def run(options: Options) -> dict[str, Any]:
    from component.checkpoint.export import run as engine

    return engine(options)
