"""SVD-LLM's own flags (arXiv 2403.07378), put in terms of the flags here: a command line in, a command line out."""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from utils.errors import UsageError

UPDATING_NSAMPLES = "16"  # SVD-LLM's own default, far below that for whitening
# what all of its compressing steps have in common: the cost of U V, the same density everywhere, all of the text
PUBLISHED = {"mode": "m", "use_pifa": False, "allocation": "uniform", "heldout_nsamples": "0"}
UPDATE = {"reconstruct_step": "1", "old_output_factor": "0", "reconstruct_nsamples": UPDATING_NSAMPLES}
STEPS: dict[int, dict[str, Any]] = {
    1: {**PUBLISHED, "prune": "svd-llm", "reconstruct_step": "0"},
    2: {**PUBLISHED, "prune": "svd-llm", **UPDATE},
    3: {**PUBLISHED, "prune": "svd", **UPDATE},
    4: {"mode": "ppl"},
    5: {"mode": "bench"},
    6: {"mode": "info"},
    7: {"mode": "generate"},
}
DECISIVE = ("mode", "prune", "reconstruct_step", "old_output_factor")  # another value of these is another step
SAME = {"ratio": "overall_ratio", "whitening_nsamples": "pruning_nsamples", "updating_nsamples": "reconstruct_nsamples"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def add_aliases(parser: argparse.ArgumentParser) -> None:
    """SVD-LLM's flags, as they are read and as --help shows them."""
    add = parser.add_argument_group("SVD-LLM's flags, by other names").add_argument
    add(
        "--step",
        type=int,
        help="instead of --mode: 1 W, 2 W + U, 3 svd + U (these imply --no-use_pifa --allocation uniform "
        "--heldout_nsamples 0), 4 ppl, 5 bench, 6 info, 7 generate",
    )
    add("--ratio", help="--overall_ratio: the fraction REMOVED, as in SVD-LLM")
    add("--whitening_nsamples", help="--pruning_nsamples")
    add("--updating_nsamples", help=f"--reconstruct_nsamples; {UPDATING_NSAMPLES} with --step 2 and 3")
    add("--lora", help="refused: --mode finetune trains adapters and merges them")


def expand(argv: Sequence[str]) -> list[str]:
    """The same command line without SVD-LLM's flags. What it says itself goes before what a step implies.

    Raises: UsageError where the flags contradict each other, or have no meaning here.
    """
    alias = _Parser(add_help=False, allow_abbrev=False)
    add_aliases(alias)
    given, rest = alias.parse_known_args(argv)
    if given.lora is not None:
        raise UsageError("--lora is part of --mode finetune here: it trains adapters and merges them into a checkpoint")
    said = _said(rest)
    more: dict[str, Any] = {}
    for name, ours in SAME.items():
        value = getattr(given, name)
        if value is None:
            continue
        if ours in said or (name == "ratio" and "density" in said):
            raise UsageError(f"--{name} and --{ours if ours in said else 'density'} say the same thing: give one")
        more[ours] = value
    if given.step is not None:
        if given.step not in STEPS:
            raise UsageError(f"unknown --step {given.step}: use one of {', '.join(map(str, STEPS))}")
        implied = STEPS[given.step]
        for name in DECISIVE:
            if name in implied and name in said and not _equal(said[name], implied[name]):
                raise UsageError(
                    f"--step {given.step} means --{name} {implied[name]} and can't go with --{name} {said[name]}"
                )
        more = {**{name: value for name, value in implied.items() if not _overruled(name, said)}, **more}
    return [*_flags(more), *rest]


def _said(argv: Sequence[str]) -> dict[str, str]:
    """The flags that a step may imply, where the command line gives them, and --density."""
    parser = _Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    names = {name for step in STEPS.values() for name in step} | {*SAME.values(), "density", "attn_ratio"}
    for name in sorted(names - {"use_pifa"}):
        parser.add_argument(f"--{name}")
    parser.add_argument("--use_pifa", action=argparse.BooleanOptionalAction)
    parser.add_argument("--owl", action="store_true")
    return vars(parser.parse_known_args(argv)[0])


def _overruled(name: str, said: dict[str, str]) -> bool:
    return name in said or (name == "allocation" and bool(said.keys() & {"owl", "attn_ratio"}))


def _equal(said: str, implied: str) -> bool:
    """As numbers where both are."""
    try:
        return float(said) == float(implied)
    except ValueError:
        return said == implied


def _flags(values: dict[str, Any]) -> list[str]:
    """--name=value, so that a negative value is no flag."""
    return [f"--no-{name}" if value is False else f"--{name}={value}" for name, value in values.items()]
