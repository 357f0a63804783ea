"""What every mode that makes a checkpoint from a checkpoint is told. Light: the front door imports it."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Request:
    """Where a run reads and writes, and on which device.

    model_path: the checkpoint to work on; None for the newest one under `save_path`. prefix: stands before the new
    folder's name. dtype: of the parameters that are written; None for the source's. command: as it was typed.
    """

    model_path: str | None
    save_path: Path
    prefix: str
    dtype: str | None
    device: str
    resume: bool
    command: str
