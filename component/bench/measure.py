"""How fast and how small the compressed layers are beside what they replace, on this machine."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from component.bench import timing
from component.bench.layer import Shape
from component.bench.names import ALL, PARTS
from component.bench.sections import SECTIONS, Result, Setting, Subject, limits_section, linear_shapes
from component.checkpoint.names import ORIGINAL
from component.checkpoint.reading import read_checkpoint
from component.checkpoint.writer import check_target, refuse_existing
from utils import models, plots, report
from utils.errors import UsageError
from utils.plots import Panel
from utils.sources import Source, find_source
from utils.whole_files import write_json

log = logging.getLogger("pifa")


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What is measured, and where the result goes. None, where it is allowed, takes what suits the device.

    what: one of PARTS or ALL; model, model_path: as the flags say; dims: of square layers; tokens: of a call;
    seconds: of one comparison; density: of the decoder linears; command: as the record quotes it.
    """

    what: str | None
    model: str | None
    model_path: str | None
    dims: tuple[int, ...] | None
    tokens: tuple[int, ...] | None
    seconds: float | None
    density: float
    dtype: str | None
    device: str
    seed: int
    save_path: str
    prefix: str
    command: str


class Defaults(NamedTuple):
    """What is measured where no flag says."""

    dims: tuple[int, ...]  # of square layers
    tokens: tuple[int, ...]
    block_tokens: tuple[int, ...]
    training_tokens: int
    dtypes: tuple[str, ...]
    seconds: float
    shapes: str  # name of the model whose shapes are taken
    config: dict[str, Any]


DEFAULTS = {
    "cuda": Defaults(
        dims=(4096, 8192, 16384, 32768),
        tokens=(1, 16, 2048, 65536),
        block_tokens=(1, 16, 2048, 16384, 65536),
        training_tokens=16384,
        dtypes=("float16",),
        seconds=2.0,
        shapes="llama-2-7b",
        config={"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    ),
    "cpu": Defaults(
        dims=(512, 1024),
        tokens=(1, 256),
        block_tokens=(1, 256),
        training_tokens=256,
        dtypes=("float32", "bfloat16"),
        seconds=0.5,
        shapes="small-llama",
        config={
            "hidden_size": 256,
            "intermediate_size": 704,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "vocab_size": 1024,
        },
    ),
}


def measure(settings: BenchSettings) -> dict[str, Any]:
    """Measure, print Markdown tables, write them to `<save_path>/<prefix>bench_...`; returns the result record.

    On the CPU with one thread. Raises: UsageError for what can't be measured, RunError where a result is wrong.
    """
    device = torch.device(settings.device)
    watch = report.Stopwatch(device)
    defaults = DEFAULTS[device.type]
    parts = _parts(settings.what)
    subject = _subject(settings.model, settings.model_path, defaults)
    folder = Path(settings.save_path) / f"{settings.prefix}bench_{'-'.join(parts)}_{subject.name}_{device.type}"
    refuse_existing(folder, "choose another --prefix, or move it away")
    check_target(folder, "", False)
    shapes = _shapes(settings, subject, defaults)
    _check_sizes(shapes, settings.tokens or defaults.tokens, settings.density)

    torch.manual_seed(settings.seed)
    dtypes = (settings.dtype,) if settings.dtype else defaults.dtypes
    results: dict[str, list[Result]] = {}
    tables: list[str] = []
    with _threads(device):
        for name in dtypes:
            dtype = models.DTYPES[name]
            setting = Setting(
                subject=subject,
                shapes=shapes,
                tokens=settings.tokens or defaults.tokens,
                block_tokens=settings.tokens or defaults.block_tokens,
                training_tokens=defaults.training_tokens,
                density=settings.density,
                dtype=dtype,
                device=device,
                limits=timing.measure_limits(device, dtype),
                seconds=settings.seconds or defaults.seconds,
            )
            for section in chain([limits_section(setting)], *(SECTIONS[part](setting) for part in parts)):
                tables.append(f"### {section.title}, {name}\n\n{section.table()}\n")
                print(tables[-1], flush=True)
                results.setdefault(section.key, []).extend(section.results)

    folder.mkdir(parents=True)
    (folder / "tables.md").write_text("\n".join(tables), encoding="utf-8")
    readings = watch.readings()
    if device.type == "cuda":
        readings.pop("peak_memory_gib")  # counted anew for every row, whose results have it
    record = {
        "mode": "bench",
        "command": settings.command,
        "model": subject.name,
        "path": str(folder),
        "dataset": None,
        "dtype": dtypes[0],
        "seed": settings.seed,
        "density_asked": settings.density,
        "device": report.device_name(device),
        "peak_memory_gib": None,
        "versions": report.versions(),
        "plots": _draw(folder, results),
        **readings,
        **results,
    }
    write_json(folder / "bench.json", record)
    return record


def _parts(what: str | None) -> tuple[str, ...]:
    if what not in (None, ALL, *PARTS):
        raise UsageError(f"unknown --bench_what {what}: use one of {', '.join(PARTS)}, {ALL}")
    return PARTS if what in (None, ALL) else (what,)


def _subject(model: str | None, model_path: str | None, defaults: Defaults) -> Subject:
    """--model_path is measured itself; else --model lends its shapes, or a LLaMA that suits the device."""
    if model_path not in (None, ORIGINAL):
        source = find_source(model_path)
        config = transformers.AutoConfig.from_pretrained(source.location, **source.arguments)
        density = None
        if getattr(config, "quantization_config", None):
            checkpoint = read_checkpoint(source.location)
            checkpoint.verify()
            density = checkpoint.record["density"]
            del config.quantization_config  # the dense model of the same shapes
        return Subject(name=source.name, config=config, density=density, load=partial(_load, source))
    if model is None:
        return Subject(defaults.shapes, transformers.LlamaConfig(**defaults.config))
    source = find_source(model)
    load = partial(_load, source) if model_path == ORIGINAL else None
    return Subject(source.name, models.load_config(source), load=load)


def _load(source: Source, dtype: torch.dtype, device: torch.device) -> Any:
    model: Any = models.load_model(source, dtype)
    return model.to(device)


def _shapes(settings: BenchSettings, subject: Subject, defaults: Defaults) -> tuple[tuple[int, int], ...]:
    """Square layers as asked; else those of the model where one was named."""
    if settings.dims is None and (settings.model is not None or settings.model_path is not None):
        return linear_shapes(subject.config)
    return tuple((d, d) for d in settings.dims or defaults.dims)


def _check_sizes(shapes: tuple[tuple[int, int], ...], tokens: tuple[int, ...], density: float) -> None:
    if min(*tokens, *map(min, shapes)) < 1:
        raise UsageError("--bench_dims and --bench_tokens take numbers from 1 on")
    for d_out, d_in in shapes:
        Shape.at_density(d_out, d_in, density)  # raises


@contextlib.contextmanager
def _threads(device: torch.device) -> Iterator[None]:
    """One on the CPU, so that runs on different machines compare; as they are elsewhere."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _draw(folder: Path, measured: dict[str, list[Result]]) -> list[str]:
    """The PIFA paper's figures 4 and 5: speedup and memory over the dimension, and over the rank."""
    if "layer" not in measured:
        return []
    if not plots.can_plot():
        log.warning("no plots without matplotlib: pip install -r %s", plots.REQUIREMENTS)
        return []
    square = [result for result in measured["layer"] if result["d_out"] == result["d_in"]]
    drawn = []
    for name, label, key, results in [
        ("dimensions.png", "d", lambda r: r["d_in"], square),
        ("ranks.png", "r / d", lambda r: r["rank"] / r["d_in"], measured["ranks"]),
    ]:
        if panels := _panels(label, key, results):
            plots.draw_panels(folder / name, panels)
            drawn.append(name)
    return drawn


def _panels(label: str, key, results: list[Result]) -> list[Panel]:
    """Speedup and memory of every row at the most tokens, in the first dtype."""
    shown = [r for r in results if not r.get("refused") and r["dtype"] == results[0]["dtype"]]
    most = max((r["tokens"] for r in shown), default=0)
    panels = []
    for value, title in (("speedup", "Speedup over dense"), ("memory", "Weights, of dense")):
        lines: dict[str, list[tuple[float, float]]] = {}
        for r in shown:
            if r["tokens"] == most:
                lines.setdefault(r["row"], []).append((key(r), r[value]))
        above = f"{title}, {most} tokens, {shown[0]['dtype']}" if shown else title
        panels.append(Panel(title=above, x_label=label, y_label=title, lines=lines))
    return panels if shown else []
