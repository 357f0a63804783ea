"""--mode info: what a checkpoint is made of, what it takes on disk, and how it was made."""

from typing import Any

from component.modes import shared
from component.modes.parser import Options

SUMMARY = "Show what a checkpoint is made of, and how it was made."
FLAGS = (shared.MODEL, shared.MODEL_PATH, shared.SAVE_PATH, shared.PREFIX, shared.DEV, shared.DTYPE)


def check(options: Options) -> None:
    """Raises: UsageError for a model that is not there."""
    shared.check_subject(options)


def run(options: Options) -> dict[str, Any]:
    from component.checkpoint.info import run as engine

    return engine(options)
