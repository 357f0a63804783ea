"""What --mode bench measures, section by section: which shapes at how many tokens, and the table of each."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn

from component.bench import layer as bench_layer
from component.bench.block import KINDS, STACKED_DENSE, MLPShape, block_makers
from component.bench.layer import Shape, layer_makers
from component.bench.model import LOADS, measure_variants, random_model
from component.bench.rows import Case, compare, compare_training
from component.bench.timing import Limits
from utils.errors import UsageError
from utils.junctions import Skeleton
from utils.report import device_name, markdown_table

Result = dict[str, Any]
Columns = dict[str, tuple[str, float]]  # header -> key in a result, and what it is multiplied by

RANKS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75)  # r / d of the comparison over ranks
LARGEST = 8192  # square layer that is compared over ranks, and forward and backward
ROWS_OVER_RANKS = (
    bench_layer.DENSE, bench_layer.LOW_RANK_SAME_RANK,
    bench_layer.PUBLISHED, bench_layer.PIVOT_ORDER, bench_layer.NATURAL_ORDER,
)  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """The model whose shapes are measured; `load` gives the model itself where it is a checkpoint.

    density: of a compressed one, whose config is that of the dense model.
    """

    name: str
    config: transformers.PretrainedConfig
    density: float | None = None
    load: Callable[[torch.dtype, torch.device], Any] | None = None


class Setting(NamedTuple):
    """All that a section needs to know."""

    subject: Subject
    shapes: tuple[tuple[int, int], ...]  # (d_out, d_in) of single layers
    tokens: tuple[int, ...]
    block_tokens: tuple[int, ...]
    training_tokens: int
    density: float
    dtype: torch.dtype
    device: torch.device
    limits: Limits
    seconds: float  # that one comparison goes on for, about

    @property
    def like(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "device": self.device}


class Section(NamedTuple):
    """Results of one kind, under `key` in the record, and how they look."""

    key: str
    title: str
    results: list[Result]
    columns: Columns

    def table(self) -> str:
        """Markdown. A row that could not be run tells why in its first empty cell."""
        rows = []
        for result in self.results:
            cells = [_cell(result.get(key), scale) for key, scale in self.columns.values()]
            if "refused" in result:
                cells[cells.index("")] = result["refused"]
            rows.append(cells)
        return markdown_table(list(self.columns), rows)


def _cell(value: Any, scale: float) -> Any:
    return "" if value is None else value if scale == 1 else scale * value


LIMITS: Columns = {"threads": ("threads", 1), "product TFLOP/s": ("matmul_tflops", 1), "copy GB/s": ("copy_gbs", 1)}
SPEED: Columns = {"tokens": ("tokens", 1), "row": ("row", 1), "ms": ("seconds", 1e3), "speedup": ("speedup", 1)}
COMPARED: Columns = {
    **SPEED, "TFLOP/s": ("tflops", 1), "GB/s": ("gbs", 1), "% of limit": ("of_limit", 100),
    "weights": ("memory", 1), "peak MiB": ("peak_bytes", 2**-20), "error": ("error", 1),
}  # fmt: skip
OVER_RANKS: Columns = {
    "rank": ("rank", 1), "density": ("density", 1), **COMPARED,
    "% memory below low-rank": ("memory_saved", 100), "% time below low-rank": ("time_saved", 100),
}  # fmt: skip
BLOCKS: Columns = {**COMPARED, "over dense, stacked": ("over_stacked", 1)}
MODELS: Columns = {
    "model": ("row", 1), "run by": ("runner", 1), "weights GiB": ("weights_gib", 1), "prefill tokens/s":
    ("prefill_tokens_s", 1), "without a cache tokens/s": ("tokens_s_without_cache", 1), "peak GiB": ("peak_gib", 1),
}  # fmt: skip


def limits_section(setting: Setting) -> Section:
    """What the machine reached in this run, which results are held against."""
    result = {"dtype": str(setting.dtype).removeprefix("torch."), "threads": torch.get_num_threads()}
    return Section(
        key="limits",
        title=device_name(setting.device),
        results=[{**result, **setting.limits._asdict()}],
        columns=LIMITS,
    )


def layer_sections(setting: Setting) -> Iterator[Section]:
    """Single layers at the density asked, and their speedups together; one of them over ranks; forward and backward."""
    every: list[Result] = []
    for d_out, d_in in setting.shapes:
        shape = Shape.at_density(d_out, d_in, setting.density)
        makers = layer_makers(shape, **setting.like)
        results = []
        for tokens in setting.tokens:
            results += compare(_case(setting, shape, tokens), makers, setting.limits, seconds=setting.seconds)
        title = f"Layer {d_out} x {d_in}, density {shape.density:.4g}: rank {shape.rank} (low-rank {shape.low_rank})"
        yield Section(key="layer", title=title, results=results, columns=COMPARED)
        every += results
    yield _over_shapes(every, max(setting.tokens))
    square = [m for m, n in setting.shapes if m == n and m <= LARGEST] or [min(map(min, setting.shapes))]
    yield _over_ranks(setting, max(square))
    yield _training(setting, max(square))


def _over_shapes(results: list[Result], tokens: int) -> Section:
    """A row for each way, a column for each shape: speedups over dense."""
    rows: dict[str, Result] = {}
    columns: Columns = {"row": ("row", 1)}
    for result in results:
        if result["tokens"] == tokens:
            shape = f"{result['d_out']} x {result['d_in']}"
            columns[shape] = (shape, 1)
            rows.setdefault(result["row"], {"row": result["row"]})[shape] = result.get("speedup", "-")
    return Section(
        key="layers", title=f"Speedup over dense, {tokens} tokens", results=list(rows.values()), columns=columns
    )


def _over_ranks(setting: Setting, d: int) -> Section:
    """With what the pivoted rows save beside the low-rank one of their rank, as fractions of its bytes and its time."""
    results: list[Result] = []
    for share in RANKS:
        shape = Shape(d, d, int(share * d))
        makers = layer_makers(shape, **setting.like, names=ROWS_OVER_RANKS)
        found = compare(_case(setting, shape, max(setting.tokens)), makers, setting.limits, seconds=setting.seconds)
        low_rank, *pivoted = found[1:]
        for result in pivoted:
            result["memory_saved"] = 1 - result["weight_bytes"] / low_rank["weight_bytes"]
            result["time_saved"] = 1 - result["seconds"] / low_rank["seconds"]
        results += found
    return Section(key="ranks", title=f"Layer {d} x {d} over ranks", results=results, columns=OVER_RANKS)


def _training(setting: Setting, d: int) -> Section:
    shape = Shape.at_density(d, d, setting.density)
    case = _case(setting, shape, setting.training_tokens)
    results = compare_training(case, layer_makers(shape, **setting.like), setting.seconds)
    return Section(key="training", title=f"Forward and backward, {d} x {d}", results=results, columns=SPEED)


def _case(setting: Setting, shape: Shape, tokens: int) -> Case:
    return Case(labels=shape.labels, d_out=shape.d_out, d_in=shape.d_in, tokens=tokens, **setting.like)


def block_sections(setting: Setting) -> Iterator[Section]:
    """The MLP of the subject; its speedups also over the dense one that has the same kernels."""
    hidden, channels = mlp_sizes(setting.subject.config)
    shape = MLPShape.at_density(hidden, channels, setting.density)
    makers = block_makers(shape, **setting.like)
    results = []
    for tokens in setting.block_tokens:
        case = Case(labels=shape.labels, d_out=hidden, d_in=hidden, tokens=tokens, **setting.like)
        found = compare(case, makers, setting.limits, seconds=setting.seconds)
        stacked = next(result for result in found if result["row"] == STACKED_DENSE)
        for result in found:
            if "refused" not in result:
                result["over_stacked"] = stacked["seconds"] / result["seconds"]
        results += found
    yield Section(
        key="block",
        title=f"MLP {hidden} -> {channels} -> {hidden}, density {setting.density:g}",
        results=results,
        columns=BLOCKS,
    )


def mlp_sizes(config: transformers.PretrainedConfig) -> tuple[int, int]:
    """Width of the hidden states and of the MLP. Raises: UsageError where the config has none of that name."""
    hidden, channels = getattr(config, "hidden_size", None), getattr(config, "intermediate_size", None)
    if hidden is None or channels is None:
        raise UsageError(f"no MLP like LLaMA's in a {config.model_type} model: leave block out of --bench_what")
    return hidden, channels


def model_sections(setting: Setting) -> Iterator[Section]:
    """The subject itself, with what it is compared to: random weights of the same shapes, speed asks for no more."""
    subject = setting.subject
    compressed = subject.density is not None
    kinds: tuple[str, ...] = KINDS
    if subject.load is not None:
        kinds = KINDS[:1] if compressed else KINDS[2:]
    variants = [(kind, partial(random_model, subject.config, kind, setting.density, **setting.like)) for kind in kinds]
    if subject.load is not None:
        variants.insert(1 if compressed else 0, (subject.name, partial(subject.load, setting.dtype, setting.device)))
    load = LOADS[setting.device.type]
    results = measure_variants(variants, load, setting.device)
    for result in results:
        result["dtype"] = str(setting.dtype).removeprefix("torch.")
    columns = dict(MODELS)
    for batch in load.batches:
        columns[f"first token ms, batch {batch}"] = (f"first_token_ms_{batch}", 1)
        columns[f"decode ms, batch {batch}"] = (f"decode_ms_{batch}", 1)
        columns[f"tokens/s, batch {batch}"] = (f"tokens_s_{batch}", 1)
    batch, length = load.prefill
    density = subject.density if subject.density is not None else setting.density
    title = f"{subject.name}, density {density:.4g}: prefill of {batch} x {length}, prompts of {load.prompt} tokens"
    yield Section(key="models", title=title, results=results, columns=columns)


SECTIONS: dict[str, Callable[[Setting], Iterator[Section]]] = {
    "layer": layer_sections, "block": block_sections, "model": model_sections,
}  # fmt: skip


def linear_shapes(config: transformers.PretrainedConfig) -> tuple[tuple[int, int], ...]:
    """(d_out, d_in) of the decoder layers' linears, each once, in the order in which they come."""
    layers = Skeleton(config).layers.values()
    linears = [m for layer in layers for m in layer.modules() if isinstance(m, nn.Linear)]
    return tuple(dict.fromkeys((linear.out_features, linear.in_features) for linear in linears))
