"""--mode ppl: perplexity of a checkpoint or of the original model."""

from dataclasses import replace
from typing import Any

from component.modes import shared
from component.modes.parser import Flag, Options, at_least

SUMMARY = "Judge a model by its perplexity on texts."
FLAGS = (
    shared.MODEL,
    shared.MODEL_PATH,
    shared.SAVE_PATH,
    replace(
        shared.DATASET, help="Texts, one or several: wikitext2, ptb, c4, alpaca, pydoc, or paths.",
        group=shared.JUDGING,
    ),
    replace(shared.MODEL_SEQ_LEN, group=shared.JUDGING),
    shared.EVAL_BATCH_SIZE,
    Flag(
        "eval_nsamples", "First windows of the text that are judged.", shared.JUDGING, kind=int, shown="all",
        check=at_least(1),
    ),
    replace(shared.SEED, help="Seed that the record names; nothing is drawn.", group=shared.MACHINE),
    shared.DEV,
    shared.DTYPE,
)  # fmt: skip


def check(options: Options) -> None:
    """Raises: UsageError for a model that is not there."""
    shared.check_subject(options)


def run(options: Options) -> dict[str, Any]:
    from evaluater import run_ppl

    return run_ppl(options)
