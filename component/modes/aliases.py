"""The flags of SVD-LLM (arXiv 2403.07378) and FLAT-LLM (arXiv 2505.23966), put in terms of the flags here.

A command line in, a command line out.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from component.modes.parser import Flag, OneLineParser, parser_of
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
# FLAT-LLM: its own flow alone, all of the text
METHODS: dict[str, dict[str, Any]] = {
    "bi": {"mode": "bi", "heldout_nsamples": "0"},
    "flatllm": {
        "mode": "m",
        "prune": "flatllm",
        "allocation": "iprs",
        "old_output_factor": "0",
        "heldout_nsamples": "0",
    },
}
DECISIVE = ("mode", "prune", "reconstruct_step", "old_output_factor")  # another value of these is another step
SAME: dict[str, tuple[str, ...]] = {
    "ratio": ("overall_ratio",),
    "sparsity_ratio": ("overall_ratio",),
    "whitening_nsamples": ("pruning_nsamples",),
    "updating_nsamples": ("reconstruct_nsamples",),
    "nsamples": ("pruning_nsamples", "reconstruct_nsamples"),
    "save": ("save_path",),
    "save_model": ("save_path",),
}


SVD_LLM, FLAT_LLM = "SVD-LLM's flags, by other names", "FLAT-LLM's flags, by other names"
ALIASES = (
    Flag(
        "step", "In place of --mode: 1 W, 2 W + U, 3 svd + U (these imply --no-use_pifa --allocation uniform "
        "--heldout_nsamples 0), 4 ppl, 5 bench, 6 info, 7 generate.", SVD_LLM, kind=int,
    ),
    Flag("ratio", "Same as --overall_ratio: the fraction REMOVED, as in SVD-LLM.", SVD_LLM),
    Flag("whitening_nsamples", "Same as --pruning_nsamples.", SVD_LLM, metavar="N"),
    Flag(
        "updating_nsamples", f"Same as --reconstruct_nsamples; {UPDATING_NSAMPLES} with --step 2 and 3.", SVD_LLM,
        metavar="N",
    ),
    Flag("lora", "Refused: --mode finetune trains adapters and merges them.", SVD_LLM),
    Flag(
        "prune_method", "Same as --mode bi (bi), or --mode m --prune flatllm with the paper's one flow (flatllm).",
        FLAT_LLM, metavar="NAME",
    ),
    Flag("sparsity_ratio", "Same as --overall_ratio in percent: the part REMOVED.", FLAT_LLM, kind=int),
    Flag("nsamples", "Same as --pruning_nsamples and --reconstruct_nsamples.", FLAT_LLM, metavar="N"),
    Flag("save", "Same as --save_path, unless there is a --save_model.", FLAT_LLM, metavar="FOLDER"),
    Flag("save_model", "Same as --save_path.", FLAT_LLM, metavar="FOLDER"),
    Flag("tol", "Without effect, here as there: widths follow from the density.", FLAT_LLM, kind=float),
    Flag("cache_dir", "Refused: the libraries read the environment variable HF_HOME.", FLAT_LLM),
)  # fmt: skip


def expand(argv: Sequence[str]) -> list[str]:
    """The same command line without SVD-LLM's flags. What it says itself goes before what a step implies.

    Raises: UsageError where the flags contradict each other, or have no meaning here.
    """
    given, rest = parser_of(ALIASES).parse_known_args(argv)
    if given.lora is not None:
        raise UsageError("--lora is part of --mode finetune here: it trains adapters and merges them into a checkpoint")
    if given.cache_dir is not None:
        raise UsageError("--cache_dir is not read here: set the environment variable HF_HOME to that folder")
    if given.sparsity_ratio is not None:
        given.sparsity_ratio = _fraction(given.sparsity_ratio)
    if given.save_model is not None:
        given.save = None
    said = _said(rest)
    more = _renamed(given, said)
    implied = _implied(given, said)
    chosen = {name: value for name, value in (implied or {}).items() if not _overruled(name, said)}
    return [*_flags({**chosen, **more}), *rest]


def _fraction(percent: int) -> str:
    """Raises: UsageError where it is none of a whole."""
    if not 0 <= percent < 100:
        raise UsageError(f"--sparsity_ratio {percent} is outside 0..99: it is the percentage removed")
    return f"{percent / 100:g}"


def _renamed(given: argparse.Namespace, said: dict[str, str]) -> dict[str, Any]:
    """What the aliases say, by the names here. Raises: UsageError where something is said twice."""
    more: dict[str, Any] = {}
    source: dict[str, str] = {}  # our name -> the alias that said it
    for name, ours in SAME.items():
        value = getattr(given, name)
        for flag in ours if value is not None else ():
            other = next((o for o in (flag, "density") if o in said and (o == flag or flag == "overall_ratio")), None)
            other = other or source.get(flag)
            if other:
                raise UsageError(f"--{name} and --{other} say the same thing: give one")
            more[flag], source[flag] = value, name
    return more


def _implied(given: argparse.Namespace, said: dict[str, str]) -> dict[str, Any] | None:
    """What --step or --prune_method stands for. Raises: UsageError where it can't go with what is said."""
    known: Mapping[Any, dict[str, Any]]
    if given.step is not None and given.prune_method is not None:
        raise UsageError("--step is SVD-LLM's and --prune_method FLAT-LLM's: give one")
    if given.step is not None:
        flag, asked, known = "step", given.step, STEPS
    elif given.prune_method is not None:
        flag, asked, known = "prune_method", given.prune_method, METHODS
    else:
        return None
    if asked not in known:
        raise UsageError(f"unknown --{flag} {asked}: use one of {', '.join(map(str, known))}")
    implied = known[asked]
    for name in DECISIVE:
        if name in implied and name in said and not _equal(said[name], implied[name]):
            raise UsageError(f"--{flag} {asked} means --{name} {implied[name]} and can't go with --{name} {said[name]}")
    return implied


def _said(argv: Sequence[str]) -> dict[str, str]:
    """The flags that a step may imply, where the command line gives them, and --density."""
    parser = OneLineParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    names = {name for implied in (*STEPS.values(), *METHODS.values()) for name in implied}
    names |= {name for ours in SAME.values() for name in ours} | {"density", "attn_ratio"}
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
