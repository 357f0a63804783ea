"""--mode m: a dense model in, a folder of low-rank factors out (or of fewer channels, or of both)."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from component.compress.recipe import tunable
from component.compress.settings import Settings
from component.modes import shared
from component.modes.parser import Flag, Options, at_least, from_zero, within
from component.ranks.allocation import ALLOCATIONS
from component.solve.names import EXACT, NARROWING, PLAIN, PRUNERS, TUNED, default_step
from utils.errors import UsageError

SUMMARY = "Compress a dense model by low-rank factors, or by fewer channels."
SOLVING, RANKS = "method", "ranks"
MOST_PROFILED = 64  # windows: the profile keeps the hidden states of every layer


def profiled(options: Options, _name: str) -> int:
    """Windows of the profile: on a CPU half, since its backward pass costs more than what it is for."""
    share = 2 if options.DEV == "cpu" else 1
    return min(-(-options.reconstruct_nsamples // share), MOST_PROFILED)


FLAGS = (
    shared.MODEL,
    shared.SAVE_PATH,
    shared.PREFIX,
    shared.RESUME,
    shared.OVERALL_RATIO,
    shared.DENSITY,
    Flag(
        "attn_ratio",
        "Fraction removed from attention, in [0,1); the MLP is cut so that the whole meets the ratio. Selects "
        "--allocation type.", shared.SIZE, kind=float, metavar="RATIO", check=within("[0", "1)", shared.REMOVED),
    ),
    Flag(
        "allocation", f"How ranks are shared out: {', '.join(ALLOCATIONS)}, or a plan's .json file.", RANKS,
        shown="kl with exact M, iprs with flatllm, else uniform", metavar="NAME",
    ),
    Flag("owl", "Select --allocation owl; with --attn_ratio the paper's MPIFA_NS.", RANKS, kind=bool, default=False),
    Flag(
        "rank_multiple", "Number that ranks are rounded down to multiples of; smaller ranks stay as they are.", RANKS,
        kind=int, default=1, check=at_least(1),
    ),
    Flag(
        "use_pifa", "Choose ranks so that the density asked is met after --mode pifa; without it, at once.", RANKS,
        kind=bool, default=True, negatable=True,
    ),
    Flag(
        "prune",
        "How weights are replaced: by factors (svd-llm, svd, asvd), fewer channels (flatllm), or the better of "
        "both by block (auto).", SOLVING, default="svd-llm", choices=PRUNERS,
    ),
    Flag(
        "reconstruct_step", "Fit by steps, as the paper: 0 none, 1 U, 2 U and then V, -1 V.", SOLVING, kind=int,
        shown="the exact fit, exact M; 0 for svd, asvd and flatllm", choices=(0, 1, 2, -1),
    ),
    replace(shared.OLD_OUTPUT_FACTOR, group=SOLVING),
    replace(shared.DRIFT_FACTOR, group=SOLVING, shown="0.5 with exact M, else 0"),
    Flag(
        "output_shrinkage",
        "How evenly errors of outputs count, in (0,1]. 1: all alike; near 0: by their effect on the model.", SOLVING,
        kind=float, shown="0.1 with exact M, else 1", check=within("(0", "1]"),
    ),
    Flag(
        "token_power", "How unevenly tokens count. 0: all alike; larger: tokens with large gradients count more.",
        SOLVING, kind=float, shown="0.5 with exact M, else 0", check=from_zero,
    ),
    Flag(
        "ridge",
        "How strongly the exact fit stays near the original weight, as a share of the Gram matrix's mean diagonal.",
        SOLVING, kind=float, default=1e-3, check=from_zero,
    ),
    Flag(
        "passes", "Times that the model is profiled; after the first, a compressed model is.", SOLVING, kind=int,
        default=1, check=at_least(1),
    ),
    Flag(
        "tune", "Settings of the constants to try on held-out windows, the starting one included; 0 tries none.",
        SOLVING, kind=int, default=0, check=at_least(0),
    ),
    Flag(
        "refine_steps", "Gradient steps on each finished layer; more than 0 is training.", SOLVING,
        kind=int, default=0, check=at_least(0),
    ),
    shared.BI_SCORE,
    shared.DATASET,
    shared.MODEL_SEQ_LEN,
    shared.PRUNING_NSAMPLES,
    shared.RECONSTRUCT_NSAMPLES,
    shared.HELDOUT_NSAMPLES,
    Flag(
        "profile_nsamples", "Windows of the profile.", shared.CALIBRATION, kind=int, default=profiled,
        shown="those for reconstruction, on a CPU half of them, 64 at most", check=at_least(1),
    ),
    Flag(
        "profiling_mat_path", "Folder of the profile, made or reused.", shared.CALIBRATION,
        shown="one under --save_path", metavar="FOLDER",
    ),
    shared.SEED,
    shared.DEV,
    shared.DTYPE,
    shared.HOST_MEMORY,
)  # fmt: skip


def check(options: Options) -> None:
    """Raises: UsageError for flags that contradict each other or need what is not there."""
    complete(options)
    shared.check_source(options)


def complete(options: Options) -> None:
    """Fill in what follows from other flags. Raises: UsageError for those that contradict each other."""
    shared.fill_density(options)
    _fill_method(options)
    _fill_allocation(options)
    if options.tune and not tunable(options.reconstruct_step, options.allocation):
        raise UsageError("--tune has nothing to choose here: it needs a reconstruction or --allocation kl")
    shared.one_text(options)


def _fill_method(options: Options) -> None:
    """The step, and for exact M the constants that held-out text chose; the published steps keep to the paper."""
    if options.reconstruct_step is None:
        options.reconstruct_step = default_step(options.prune)
    exact = options.reconstruct_step is EXACT
    for flag, value in (TUNED if exact else PLAIN).items():
        if getattr(options, flag) is None:
            setattr(options, flag, value)
    if options.output_shrinkage == PLAIN["output_shrinkage"]:
        options.output_shrinkage = None
    for flag in ("drift_factor", "token_power", "refine_steps"):
        if getattr(options, flag) and options.reconstruct_step == 0:
            raise UsageError(f"--{flag} needs a reconstruction: leave out --reconstruct_step 0")
    if options.output_shrinkage is not None and not exact:
        raise UsageError("--output_shrinkage is for the exact solver: leave out --reconstruct_step, use svd-llm")


def _fill_allocation(options: Options) -> None:
    """--attn_ratio selects type, --owl owl, both together owl times type; another explicit one is refused.

    Else the published methods are as in their papers, and exact M has the best ranks.
    """
    implied = "owl" if options.owl else "type" if options.attn_ratio is not None else None
    flags = " and ".join(["--owl"] * options.owl + ["--attn_ratio"] * (options.attn_ratio is not None))
    if implied and options.allocation not in (None, implied):
        raise UsageError(f"{flags} selects --allocation {implied} and can't go with {options.allocation}")
    usual = "iprs" if options.prune == NARROWING else "kl" if options.reconstruct_step is EXACT else "uniform"
    options.allocation = options.allocation or implied or usual
    if options.allocation not in ALLOCATIONS and not options.allocation.endswith(".json"):
        raise UsageError(
            f"unknown --allocation {options.allocation}: use one of {', '.join(ALLOCATIONS)}, or a plan's .json file"
        )
    if options.allocation.endswith(".json") and not Path(options.allocation).is_file():
        raise UsageError(f"no such plan: {options.allocation}")


def settings_of(options: Options) -> Settings:
    """What decides the result."""
    return shared.as_settings(Settings, options)


def run(options: Options) -> dict[str, Any]:
    """Compress --model and write the checkpoint; returns the result record."""
    from component.compress.folder import compress_into_folder
    from component.compress.job import Place

    profile = options.profiling_mat_path
    place = Place(
        save_path=Path(options.save_path),
        prefix=options.prefix,
        resume=options.resume,
        profile=Path(profile) if profile else None,
        device=options.DEV,
        host_memory=options.host_memory,
        command=options.command,
    )
    return compress_into_folder(settings_of(options), place)
