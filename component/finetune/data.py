"""What fine-tuning reads: instructions and texts -> rows of tokens, a seeded mixture of them, padded batches."""

import hashlib
import json
import logging
import math
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from component.finetune.names import SELF
from utils import data
from utils.errors import UsageError
from utils.names import check_dataset

log = logging.getLogger("pifa")

C4_ROWS = 270_000  # the 1000 steps of PIFA's appendix B.3 read some 130 million tokens of it
IGNORED = -100  # the label of a token that is no target, as in transformers


class Row(NamedTuple):
    """tokens: (length,) int64; the first `given` of them are a prompt, read but not learned."""

    tokens: Tensor
    given: int


class Batch(NamedTuple):
    """tokens, labels: (rows, length) int64, padded on the right; labels are IGNORED at prompts and padding."""

    tokens: Tensor
    labels: Tensor


class Share(NamedTuple):
    """One entry of --data_path: a file or a named set, and its part of the mixture, if it says one."""

    name: str
    weight: float | None


def parse_mixture(entries: Sequence[str]) -> list[Share]:
    """`a.txt:0.02 b.jsonl:0.98` -> shares; without weights every row counts alike.

    Raises: UsageError where only some have a weight, one is no number above 0, or a name is unknown.
    """
    shares = [_share(entry) for entry in entries]
    weights = [share.weight for share in shares]
    if None in weights and any(weight is not None for weight in weights):
        raise UsageError("--data_path: give every entry a weight (a.txt:0.02 b.jsonl:0.98), or none")
    if any(weight is not None and not 0 < weight < math.inf for weight in weights):
        raise UsageError("--data_path: a weight is a number above 0")
    names = [share.name for share in shares]
    for name in names:
        if name != SELF:
            check_dataset(name)
    if SELF in names and (names.count(SELF) > 1 or len(names) == 1 or None in weights):
        raise UsageError(
            f"--data_path {SELF} comes once, beside a text that gives it beginnings, with weights for both"
        )
    return shares


def _share(entry: str) -> Share:
    name, colon, weight = entry.rpartition(":")
    if not colon or Path(entry).exists():
        return Share(entry, None)
    try:
        return Share(name, float(weight))
    except ValueError:
        return Share(entry, None)


def read_rows(name: str, tokenizer: Any, length: int) -> list[Row]:
    """The rows of a file or named set, none longer than `length` tokens.

    Objects with an `instruction` (in a .json list, or a .jsonl) become a prompt and a response each. All else is text
    as --dataset takes it, cut into windows, every token of which is a target but the first.

    Raises: UsageError where nothing is left to learn, or the file can't be read.
    """
    examples = _read_instructions(Path(name))
    if examples is None:
        tokens = data.tokenize(tokenizer, data.read_text(name, "train", C4_ROWS).text)
        if len(tokens) < length:
            raise UsageError(f"{name} has {len(tokens)} tokens, too few for a window of {length}: lower --cutoff_len")
        return [Row(window, 0) for window in data.consecutive_windows(tokens, length)]
    cut = [instruction_row(example, tokenizer, length) for example in examples]
    rows = [row for row in cut if max(row.given, 1) < len(row.tokens)]  # nothing predicts the first token
    if len(rows) < len(cut):
        log.warning("%s: %d prompts of %d leave no room for an answer", name, len(cut) - len(rows), len(cut))
    if not rows:
        raise UsageError(f"{name} has no answer to learn from: raise --cutoff_len {length}, or give other data")
    return rows


def _read_instructions(path: Path) -> list[dict[str, str]] | None:
    """The objects of an instruction file; None for what holds text."""
    if path.suffix not in (".json", ".jsonl") or not path.is_file():
        return None
    try:
        text = path.read_text(encoding="utf-8")
        lines = [line for line in text.split("\n") if line.strip()]
        objects = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    if not isinstance(objects, list) or not all(isinstance(example, dict) for example in objects):
        raise UsageError(f"{path}: a .json file is a list of objects, a .jsonl file has one in each line")
    if path.suffix == ".jsonl" and not any("instruction" in example for example in objects):
        return None
    for number, example in enumerate(objects, start=1):
        if not all(isinstance(example.get(key), str) for key in ("instruction", "output")):
            raise UsageError(f'{path}, object {number}: it needs strings under "instruction" and "output"')
        if not isinstance(example.get("input") or "", str):
            raise UsageError(f'{path}, object {number}: "input" is not a string')
    return objects


def prompt_of(example: dict[str, str]) -> str:
    """Everything before the answer, under the headings that Alpaca's data is used with."""
    parts = [f"### Instruction:\n{example['instruction']}\n\n"]
    if example.get("input"):
        parts.append(f"### Input:\n{example['input']}\n\n")
    return "".join([*parts, "### Response:\n"])


def instruction_row(example: dict[str, str], tokenizer: Any, length: int) -> Row:
    """Prompt, answer and the end of the text, cut to `length`; `given` is where the answer starts.

    The text is tokenized as a whole; a token that spans prompt and answer belongs to the answer.
    """
    prompt = prompt_of(example)
    before = tokenizer(prompt, verbose=False)["input_ids"]
    tokens = tokenizer(prompt + example["output"], verbose=False)["input_ids"]
    given = 0
    while given < min(len(before), len(tokens)) and before[given] == tokens[given]:
        given += 1
    end = tokenizer.eos_token_id
    if end is not None and tokens[-1] != end:
        tokens = [*tokens, end]
    tokens = tokens[:length]
    return Row(torch.tensor(tokens, dtype=torch.int64), min(given, len(tokens)))


def draw(counts: Sequence[int], weights: Sequence[float], *, total: int, seed: str) -> list[tuple[int, int]]:
    """`total` times (source, row), in random order: each source has its share exactly, to rounding.

    counts: rows of each source, weights: their shares, of any sum. A source's rows are all used before one comes
    again. The same arguments give the same draws, so a step's rows are known without those before it.
    """
    shuffle = random.Random(seed).shuffle
    sources = [source for source, quota in enumerate(quotas(weights, total)) for _ in range(quota)]
    shuffle(sources)
    waiting: list[list[int]] = [[] for _ in counts]
    drawn = []
    for source in sources:
        if not waiting[source]:
            waiting[source] = list(range(counts[source]))
            shuffle(waiting[source])
        drawn.append((source, waiting[source].pop()))
    return drawn


def quotas(weights: Sequence[float], total: int) -> list[int]:
    """`total` divided in proportion to the weights, by largest remainders."""
    exact = [total * weight / sum(weights) for weight in weights]
    parts = [math.floor(part) for part in exact]
    for source in sorted(range(len(exact)), key=lambda s: parts[s] - exact[s])[: total - sum(parts)]:
        parts[source] += 1
    return parts


def collate(rows: Sequence[Row]) -> Batch:
    """One batch, as long as its longest row. Padding comes last, where a causal model can't see it from a target."""
    length = max(len(row.tokens) for row in rows)
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    labels = torch.full_like(tokens, IGNORED)
    for number, row in enumerate(rows):
        tokens[number, : len(row.tokens)] = row.tokens
        labels[number, row.given : len(row.tokens)] = row.tokens[row.given :]
    return Batch(tokens, labels)


def hash_of_rows(rows: Iterable[Row]) -> str:
    """sha256 of the tokens and where their prompts end."""
    hashed = hashlib.sha256()
    for row in rows:
        hashed.update(f"{len(row.tokens)} {row.given} ".encode())
        hashed.update(row.tokens.numpy().tobytes())
    return hashed.hexdigest()
