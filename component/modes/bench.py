"""--mode bench: how fast and how small the compressed layers are beside what they replace, on this machine."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from component.bench.names import ALL, PARTS
from component.modes import shared
from component.modes.parser import Flag, Options
from utils.errors import UsageError

if TYPE_CHECKING:
    from component.bench.measure import BenchSettings

SUMMARY = "Measure speed and memory of layers, blocks and models."
MEASURES = "what is measured"


def some_time(name: str, value: float) -> None:
    """Raises: UsageError for no time."""
    if value <= 0:
        raise UsageError(f"--{name} takes a time above 0")


FLAGS = (
    replace(
        shared.MODEL, help="Model whose shapes are measured.", default=None,
        shown="LLaMA-2-7B's, on a CPU small ones",
    ),
    replace(shared.MODEL_PATH, help="Checkpoint that is measured itself.", shown=""),
    shared.SAVE_PATH,
    shared.PREFIX,
    replace(shared.OVERALL_RATIO, shown="0.45"),
    replace(shared.DENSITY, shown="0.55"),
    Flag("bench_what", "Part that is measured.", MEASURES, default=ALL, choices=(*PARTS, ALL)),
    Flag(
        "bench_dims", "Sizes of square layers.", MEASURES, kind=int, several=True,
        shown="4096 to 32768, on a CPU 512 1024",
    ),
    Flag(
        "bench_tokens", "Tokens of a call.", MEASURES, kind=int, several=True,
        shown="1 16 2048 65536, block also 16384, on a CPU 1 256",
    ),
    Flag(
        "bench_seconds", "Seconds that a comparison takes; at least 8 rounds are run.", MEASURES, kind=float,
        shown="2, on a CPU 0.5", check=some_time,
    ),
    replace(shared.SEED, help="Seed of the random weights and inputs.", group=MEASURES),
    shared.DEV,
    replace(shared.DTYPE, shown="float16 on a GPU; float32 and bfloat16 on a CPU"),
)  # fmt: skip


def check(options: Options) -> None:
    """Raises: UsageError for sizes that contradict each other."""
    shared.fill_density(options, ratio=0.45)


def run(options: Options) -> dict[str, Any]:
    """Measure; returns the result record."""
    from component.bench.measure import measure

    return measure(settings_of(options))


def settings_of(options: Options) -> "BenchSettings":
    from component.bench.measure import BenchSettings

    return BenchSettings(
        what=options.bench_what,
        model=options.model,
        model_path=options.model_path,
        dims=None if options.bench_dims is None else tuple(options.bench_dims),
        tokens=tuple(options.bench_tokens) if options.bench_tokens else None,
        seconds=options.bench_seconds,
        density=options.density,
        dtype=options.dtype,
        device=options.DEV,
        seed=options.seed,
        save_path=options.save_path,
        prefix=options.prefix,
        command=options.command,
    )
