"""--mode ppl: perplexity of a checkpoint or of the original model."""

from dataclasses import replace
from typing import Any

from component.modes import shared
from component.modes.parser import Flag, Options, at_least

SUMMARY = "Judge a model by its perplexity on texts."
FLAGS = (
    shared.SUBJECT,
    shared.MODEL_PATH,
    shared.SAVE_PATH,
    replace(
        shared.DATASET, help="Texts, one or several: wikitext2, ptb, c4, alpaca, pydoc, or paths.",
        group=shared.JUDGING,
    ),
    replace(shared.MODEL_SEQ_LEN, group=shared.JUDGING),
    shared.EVAL_BATCH_SIZE,
    Flag(
        "eval_nsamples", "First windows of the text, if not all of them, that are judged.", shared.JUDGING, kind=int,
        shown="all", check=at_least(1),
    ),
    shared.UNUSED_SEED,
    shared.DEV,
    shared.DTYPE,
)  # fmt: skip


check = shared.check_subject


def run(options: Options) -> dict[str, Any]:
    """Judge; returns the result record. Texts and windows come before the model is loaded."""
    from component.modes.subject import find_subject, load_judged
    from evaluater import perplexity
    from utils import data
    from utils.attention import repeat_heads

    texts = [data.read_text(name, "test") for name in options.dataset or [None]]
    source, tokenizer = find_subject(options)
    windows = {
        text.name: data.consecutive_windows(
            data.tokenize(tokenizer, text.text), options.model_seq_len, options.eval_nsamples
        )
        for text in texts
    }
    model, watch, record = load_judged(source, options)
    if record["dtype"] == "float32" and watch.device.type == "cuda":
        repeat_heads(model)
    results = {name: perplexity(model, rows, options.eval_batch_size) for name, rows in windows.items()}
    first = results[texts[0].name]
    return {
        **record,
        "mode": "ppl",
        "dataset": texts[0].name,
        "ppl": first.ppl,
        "tokens": first.tokens,
        "windows": first.windows,
        "model_seq_len": options.model_seq_len,
        "tokens_per_second": round(first.tokens_per_second, 1),
        **({"ppls": {name: result.ppl for name, result in results.items()}} if len(results) > 1 else {}),
        **watch.readings(),
    }
