"""Calibration and test text -> windows of tokens."""

import json
import logging
import random
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlparse

import torch
from torch import Tensor

from utils.errors import UsageError
from utils.hub_sets import HUB_SETS
from utils.names import DATASETS

log = logging.getLogger("pifa")

DEFAULT = "wikitext2"
OFFLINE_DEFAULT = "pydoc"
PYDOC_EVALUATION_SHARE = 0.1
HELD_OUT_SHARE = 5
C4_ROWS = {"train": 20_000, "validation": 1_100}  # the papers use a sample of C4, not its 300 GB


@dataclass(frozen=True)
class Text:
    """A text, and the name under which results quote it."""

    name: str
    text: str


def read_text(dataset: str | None, split: str, c4_rows: int | None = None) -> Text:
    """The text of --dataset: `split` is "train" for calibration, "test" for evaluation.

    dataset: a name of DATASETS (utils/names.py) or a path (.txt, .jsonl, .parquet, or a folder saved by `datasets`),
    which serves whole for both splits. None means the default, and the offline default where the hub is out of reach.
    c4_rows: how many of C4's rows to read, where C4_ROWS are not enough.

    Raises: UsageError for an unknown name, an unreadable path, or a named set that can't be had.
    """
    if dataset is None:
        if hub_reachable() or _cached(DEFAULT):
            return read_text(DEFAULT, split)
        log.warning("%s is not cached and the hub can't be reached: using %s instead", DEFAULT, OFFLINE_DEFAULT)
        return read_text(OFFLINE_DEFAULT, split)
    if dataset == "pydoc":
        return Text("pydoc", _pydoc(split))
    if dataset in DATASETS:
        if not (hub_reachable() or _cached(dataset)):
            raise UsageError(
                f"--dataset {dataset} is not cached and the hub can't be reached; give a local file, or pydoc"
            )
        return Text(dataset, _join(_hub_rows(dataset, split, c4_rows)))
    try:
        return Text(dataset, _read_path(Path(dataset)))
    except (OSError, ValueError) as error:  # no UTF-8, no parquet
        raise UsageError(f"cannot read {dataset}: {error}") from error


def _pydoc(split: str) -> str:
    """The Python language reference inside CPython; its last tenth is for evaluation."""
    from pydoc_data.topics import topics

    text = _join(topics.values())
    cut = int(len(text) * (1 - PYDOC_EVALUATION_SHARE))
    return text[:cut] if split == "train" else text[cut:]


def _join(rows: Iterable[str]) -> str:
    return "\n\n".join(rows)


def _read_path(path: Path) -> str:
    if path.is_dir():
        import datasets

        if not any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
            raise UsageError(f"{path} is not a folder that `datasets` saved")
        saved = datasets.load_from_disk(str(path))
        if isinstance(saved, datasets.DatasetDict):
            raise UsageError(f"{path} holds several splits: name one of {', '.join(f'{path}/{key}' for key in saved)}")
        return _join(_text_column(str(path), saved))
    if path.suffix == ".txt":
        return path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return _join(_jsonl_rows(path))
    if path.suffix == ".parquet":
        import datasets

        try:
            rows = datasets.Dataset.from_parquet(str(path))
        except datasets.exceptions.DatasetsError as error:
            raise UsageError(f"cannot read {path}: {error.__cause__ or error}") from error
        return _join(_text_column(str(path), rows))
    raise UsageError(f"{path}: a dataset path is a .txt, .jsonl or .parquet file, or a folder saved by `datasets`")


def _jsonl_rows(path: Path) -> list[str]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"{path}, line {number}: not JSON ({error.msg})") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise UsageError(f'{path}, line {number}: each line is an object with a string under "text"')
        rows.append(row["text"])
    return rows


def _text_column(where: str, dataset) -> Iterable[str]:
    if "text" not in dataset.column_names:
        raise UsageError(f"{where} has no column `text`, only {', '.join(dataset.column_names)}")
    return dataset["text"]


def hub_reachable() -> bool:
    """Whether the hub's name resolves: one quick question, where the libraries would retry for half a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def _cached(dataset: str) -> bool:
    """Whether `datasets` has prepared the set on this machine before, which it can use without the hub."""
    import datasets

    return (Path(datasets.config.HF_DATASETS_CACHE) / HUB_SETS[dataset]["path"].replace("/", "___")).is_dir()


def _hub_rows(dataset: str, split: str, c4_rows: int | None) -> Iterable[str]:
    import datasets

    entry = dict(HUB_SETS[dataset])
    column, split = entry.pop("column"), entry.pop("splits")[split]
    if "data_files" in entry:
        entry["data_files"] = {split: entry["data_files"][split]}
        entry["verification_mode"] = "no_checks"
    try:
        rows = datasets.load_dataset(**entry, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"cannot load dataset {dataset} ({first}); give a local file, or pydoc") from error
    if dataset == "c4":
        rows = rows.select(range(min(c4_rows or C4_ROWS[split], len(rows))))
    return rows[column]


def tokenize(tokenizer, text: str) -> Tensor:
    """The whole text as one row of tokens: (count,) int64, special tokens as the tokenizer sets them by default."""
    # verbose=False: the text is longer than any model's window, on purpose
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def hold_out(tokens: Tensor, count: int, length: int) -> tuple[Tensor, Tensor]:
    """Cut the last `count` windows off a text: the tokens before them, and the windows, (count, length).

    No more than a fifth of the text goes, in whole windows; where that is less than asked, it is said.
    """
    kept = min(count, len(tokens) // HELD_OUT_SHARE // length)
    if kept < count:
        log.warning(
            "%d windows of %d are more than a fifth of the text's %d tokens: held out are the last %d",
            count, length, len(tokens), kept,
        )  # fmt: skip
    cut = len(tokens) - kept * length
    return tokens[:cut], tokens[cut:].reshape(kept, length)


def random_windows(tokens: Tensor, count: int, length: int, *, seed: int) -> Tensor:
    """count windows at random starts, with replacement: (count, length).

    Raises: UsageError where the text is shorter than one window.
    """
    last = len(tokens) - length - 1
    if last < 0:
        raise UsageError(f"the text has {len(tokens)} tokens, too few for a window of {length}: lower --model_seq_len")
    draw = random.Random(seed)
    starts = [draw.randint(0, last) for _ in range(count)]
    return torch.stack([tokens[start : start + length] for start in starts])


def consecutive_windows(tokens: Tensor, length: int, limit: int | None = None) -> Tensor:
    """All whole windows from the start of the text, or the first `limit`: (count, length); the rest is dropped.

    Raises: UsageError where the text is shorter than one window.
    """
    count = len(tokens) // length
    if count == 0:
        raise UsageError(f"the text has {len(tokens)} tokens, too few for a window of {length}: lower --model_seq_len")
    count = min(count, limit) if limit else count
    return tokens[: count * length].reshape(count, length)


class CalibrationWindows(NamedTuple):
    """Windows of the text of that name, (count, length) int64 each: for calibration, and the last ones of the text."""

    dataset: str
    windows: Tensor
    held_out: Tensor


def calibration_windows(
    tokenizer, dataset: str | None, *, count: int, length: int, seed: int, held_out: int
) -> CalibrationWindows:
    """Random windows of a text's calibration split, after `held_out` windows have been cut off its end.

    Raises: UsageError where the text can't be had or is shorter than one window.
    """
    text = read_text(dataset, "train")
    before, last = hold_out(tokenize(tokenizer, text.text), held_out, length)
    return CalibrationWindows(text.name, random_windows(before, count, length, seed=seed), last)
