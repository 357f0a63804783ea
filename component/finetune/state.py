"""What an unfinished fine-tuning keeps in its folder, so that a killed one goes on.

Both files are safetensors, replaced as a whole and removed in the end.
"""

import json
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from component.checkpoint.reading import open_shard
from component.finetune.loop import Point, Training
from utils.whole_files import whole

STATE = ".training.safetensors"  # parameters and the optimiser's memory in the stage that runs
MERGED = ".merged.safetensors"  # the factors that earlier stages changed, in float32


class Progress(NamedTuple):
    """Where a run stands: the stage that runs, and the loss curves of the stages up to it, by name."""

    stage: int
    curves: dict[str, list[Point]]


def save_progress(folder: Path, progress: Progress, training: Training | None) -> None:
    """Note the stage's state; before its first step there is none."""
    _replace(folder / STATE, training.tensors() if training else {}, {"progress": json.dumps(progress._asdict())})


def save_merged(folder: Path, tensors: dict[str, Tensor]) -> None:
    _replace(folder / MERGED, tensors, {})


def load_progress(folder: Path) -> tuple[Progress, dict[str, Tensor]]:
    """The progress that is noted, or that of a run which has just begun; and the stage's tensors."""
    if not (folder / STATE).is_file():
        return Progress(0, {}), {}
    tensors = open_shard(folder / STATE)
    with safe_open(folder / STATE, framework="pt") as file:
        return Progress(**json.loads(file.metadata()["progress"])), tensors


def load_merged(folder: Path) -> dict[str, Tensor]:
    return open_shard(folder / MERGED) if (folder / MERGED).is_file() else {}


def remove_state(folder: Path) -> None:
    for name in (STATE, MERGED):
        (folder / name).unlink(missing_ok=True)


def _replace(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    with whole(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
