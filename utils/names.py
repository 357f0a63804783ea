"""Names that flags take, for the parser: importing them loads no library."""

from pathlib import Path

from utils.errors import UsageError
from utils.hub_sets import HUB_SETS

DTYPE_NAMES = ("float32", "float16", "bfloat16")
DATASETS = (*HUB_SETS, "pydoc")  # that --dataset knows by name


def check_dataset(dataset: str | None) -> None:
    """Raises: UsageError where --dataset is neither a known name nor a path that exists."""
    if dataset is not None and dataset not in DATASETS and not Path(dataset).exists():
        raise UsageError(f"unknown dataset {dataset}: use one of {', '.join(DATASETS)}, or a path that exists")
