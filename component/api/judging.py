"""Judge a model in memory by its perplexity on a text, as --mode ppl does with a folder."""

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluater import Perplexity, perplexity
from utils import data


def judge_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dataset: str | None = None,
    model_seq_len: int = 2048,
    eval_nsamples: int | None = None,
    eval_batch_size: int = 4,
) -> Perplexity:
    """Perplexity on a text's test split: consecutive windows of `model_seq_len` tokens, the mean over all of them.

    dataset: a name or a path; None for WikiText-2, offline the Python reference. eval_nsamples: the first windows only,
    None for all. eval_batch_size: windows of a forward pass. The model is put into eval mode.

    Returns (ppl, tokens, windows, tokens_per_second). Raises: UsageError for a text that can't be had or is shorter
    than a window, RunError for a loss that is not finite.
    """
    text: Any = data.read_text(dataset, "test")
    model.eval()
    windows = data.consecutive_windows(data.tokenize(tokenizer, text.text), model_seq_len, eval_nsamples)
    return perplexity(model, windows, eval_batch_size)
