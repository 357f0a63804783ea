"""Judges a model: perplexity, zero-shot tasks. Knows nothing of how the model was made."""

import time
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import component.format.integration  # noqa: F401  (teaches transformers to load checkpoints)
from utils.errors import RunError


class Perplexity(NamedTuple):
    """exp of the mean negative log-likelihood per predicted token, and what it was measured on."""

    ppl: float
    tokens: int
    windows: int
    tokens_per_second: float


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor, batch_size: int) -> Perplexity:
    """Perplexity as the papers compute it: whole windows, each on its own, float32 logits, mean over all tokens.

    windows: (count, length) int64; each predicts its length - 1 last tokens. `tokens` counts those of the windows.

    Raises: RunError naming the first window whose loss is not finite.
    """
    device = next(model.parameters()).device
    losses: list[Tensor] = []
    began = time.perf_counter()
    for batch in tqdm(windows.split(batch_size), desc="perplexity", unit="batch"):
        logits = model(batch.to(device), use_cache=False).logits
        # a window at a time: float32 logits of a whole batch would be the largest tensor of the run
        for window, scores in zip(batch.to(device), logits, strict=True):
            losses.append(F.cross_entropy(scores[:-1].float(), window[1:]))
    values = torch.stack(losses).double().cpu()
    seconds = time.perf_counter() - began
    wrong = (~torch.isfinite(values)).nonzero().flatten()
    if len(wrong):
        raise RunError(f"the loss of window {wrong[0].item()} (of {len(values)}) is not finite")
    return Perplexity(
        ppl=values.mean().exp().item(),
        tokens=windows.numel(),
        windows=len(windows),
        tokens_per_second=windows.numel() / seconds,
    )


def zero_shot(
    model: Any,
    tokenizer: Any,
    tasks: list[str],
    *,
    manager: Any = None,
    batch_size: int = 4,
    num_fewshot: int | None = None,
    limit: int | None = None,
    seed: int = 3,
) -> dict[str, dict[str, float]]:
    """Task -> measure -> value, by the lm-evaluation-harness on the model as it is in memory.

    manager: the harness's TaskManager where tasks are not its own; num_fewshot: examples before each question, None
    for the task's own number; limit: judge on the first documents of a task only. Needs requirements-eval.txt.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    judged: Any = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=tasks,
        task_manager=manager,
        num_fewshot=num_fewshot,
        limit=limit,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
        bootstrap_iters=100,  # some measures have no standard error but by resampling
        log_samples=False,
    )
    return {
        task: {name.removesuffix(",none"): value for name, value in measures.items() if isinstance(value, float)}
        for task, measures in judged["results"].items()
    }
