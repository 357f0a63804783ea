"""The flags that say where a run reads and writes, as plain values."""

from pathlib import Path

from component.checkpoint.request import Request
from component.modes.parser import Options


def request_of(options: Options, *, prefix: str) -> Request:
    """For the modes that make a checkpoint from a checkpoint. prefix: stands before the new folder's name."""
    return Request(
        model_path=options.model_path,
        save_path=Path(options.save_path),
        prefix=prefix,
        dtype=options.dtype,
        device=options.DEV,
        resume=options.resume,
        command=options.command,
    )
