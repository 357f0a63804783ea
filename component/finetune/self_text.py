"""Text that a teacher writes itself, for a student to learn from: `self` in --data_path.

A small text is soon learned by heart. What the teacher makes of its beginnings has no end, and its distributions are
what the student is to learn (data-free distillation: LLM-QAT, arXiv 2305.17888).
"""

import itertools
import logging
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig

from component.checkpoint import reading as files
from component.finetune.data import Row
from component.finetune.names import SELF
from utils.errors import UsageError
from utils.whole_files import whole

log = logging.getLogger("pifa")

BEGINNING = 16  # tokens of a given text that a row starts with
MOST_ON_GPU, MOST_ON_CPU = 512, 32  # rows at once
MEMORY_SHARE = 4  # the cache takes at most this part of the free memory


def written_rows(
    path: Path, load: Callable[[], Any], rows: Sequence[Row], *, count: int, length: int, seed: int
) -> list[Row]:
    """`count` rows of `length` tokens, from the file at `path`, or written now by the model that `load` gives.

    They are kept, as sampling is not the same to the bit on another machine. path: its name has to tell what decides
    the text. rows: of given texts. Raises: UsageError where none of them is long enough to begin with.
    """
    if not path.exists():
        started = beginnings(rows, count, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        tokens = continued(load(), started, length=length, seed=seed)
        with whole(path) as temporary:
            save_file({"tokens": tokens.int()}, temporary)
        log.info("%d rows of %d tokens are in %s", count, length, path)
    return [Row(row, 0) for row in files.open_shard(path)["tokens"].long()]


def beginnings(rows: Sequence[Row], count: int, seed: int) -> Tensor:
    """Stretches of BEGINNING tokens at random places of random rows: (count, BEGINNING) int64.

    Raises: UsageError where no row has so many.
    """
    enough = [row.tokens for row in rows if len(row.tokens) >= BEGINNING]
    if not enough:
        raise UsageError(f"--data_path {SELF} needs another text in which a row has {BEGINNING} tokens, to begin with")
    draw = random.Random(f"{SELF} {seed}")
    stretches = []
    for _ in range(count):
        tokens = draw.choice(enough)
        start = draw.randint(0, len(tokens) - BEGINNING)
        stretches.append(tokens[start : start + BEGINNING])
    return torch.stack(stretches)


@torch.no_grad()
def continued(model: Any, started: Tensor, *, length: int, seed: int) -> Tensor:
    """Draw on from the model's own distribution to `length` tokens: (count, length) int64 on the CPU.

    started: (count, BEGINNING). An end-of-text token is a token like others: another text follows it.
    """
    device = next(model.parameters()).device
    at_once = min(_fitting(model, length, device), len(started))
    write = _lean_writer(model, at_once, length=length, seed=seed) or _writer(model, length, seed)
    parts = tqdm(started.split(at_once), desc="write", unit="batch")
    return torch.cat([write(part.to(device)).cpu() for part in parts])


def _fitting(model: Any, length: int, device: torch.device) -> int:
    if device.type != "cuda":
        return MOST_ON_CPU
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    row = 2 * config.num_hidden_layers * heads * size * length * next(model.parameters()).element_size()
    return max(1, min(MOST_ON_GPU, torch.cuda.mem_get_info(device)[0] // MEMORY_SHARE // row))


def _lean_writer(model: Any, at_once: int, *, length: int, seed: int) -> Callable[[Tensor], Tensor] | None:
    """By the lean runner; None where it does not know the model."""
    from component.runner.model import LeanModel

    try:
        lean = LeanModel.from_transformers(model, at_once, length)
    except UsageError as error:
        log.info("the lean runner does not take this model (%s): transformers writes", error)
        return None
    lean.eos = []
    draw = torch.Generator(device=lean.position.device).manual_seed(seed)
    return lambda tokens: lean.generate(tokens, length - tokens.shape[1], temperature=1.0, generator=draw)


def _writer(model: Any, length: int, seed: int) -> Callable[[Tensor], Tensor]:
    # what is left out here would be taken from the model's own config; no token has the id that ends a text
    plain = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    endless = GenerationConfig(**plain, max_length=length, eos_token_id=model.config.vocab_size, pad_token_id=0)
    seeds = itertools.count(seed << 32)

    def write(tokens: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[tokens.device] if tokens.is_cuda else []):
            torch.manual_seed(next(seeds))
            return model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=endless)

    return write
