"""--mode bench: how fast and how small the compressed layers are beside what they replace, on this machine."""

import contextlib
import logging
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

import component.format.integration  # noqa: F401  (teaches transformers to load checkpoints)
from component.bench import timing
from component.bench.layer import Shape
from component.bench.sections import SECTIONS, Result, Setting, Subject, limits_section, linear_shapes
from component.checkpoint import reading as files
from component.checkpoint.writer import check_target
from utils import models, plots, report
from utils.errors import UsageError
from utils.plots import Panel
from utils.whole_files import write_json

log = logging.getLogger("pifa")


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
        (4096, 8192, 16384, 32768), (1, 16, 2048, 65536), (1, 16, 2048, 16384, 65536), 16384, ("float16",), 2.0,
        "llama-2-7b",
        {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    ),
    "cpu": Defaults(
        (512, 1024), (1, 256), (1, 256), 256, ("float32", "bfloat16"), 0.5, "small-llama",
        {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 8,
         "vocab_size": 1024},
    ),
}  # fmt: skip


def run(options: Namespace) -> dict[str, Any]:
    """Measure, print Markdown tables, write them to `<save_path>/<prefix>bench_...`; returns the result record.

    On the CPU with one thread. Raises: UsageError for what can't be measured, RunError where a result is wrong.
    """
    device = torch.device(options.DEV)
    watch = report.Stopwatch(device)
    defaults = DEFAULTS[device.type]
    what = _what(options.bench_what)
    subject = _subject(options, defaults)
    folder = Path(options.save_path) / f"{options.prefix}bench_{'-'.join(what)}_{subject.name}_{device.type}"
    if folder.exists():
        raise UsageError(f"{folder} exists and nothing is ever overwritten: choose another --prefix, or move it away")
    check_target(folder, "", False)
    shapes = _shapes(options, subject, defaults)
    asked = tuple(options.bench_tokens or ())
    tokens, block_tokens = asked or defaults.tokens, asked or defaults.block_tokens
    _check_sizes(shapes, tokens, options.density)

    torch.manual_seed(options.seed)
    dtypes = (options.dtype,) if options.dtype else defaults.dtypes
    seconds = options.bench_seconds or defaults.seconds
    found: dict[str, list[Result]] = {}
    tables: list[str] = []
    with _threads(device):
        for name in dtypes:
            dtype = models.DTYPES[name]
            limits = timing.measure_limits(device, dtype)
            setting = Setting(
                subject, shapes, tokens, block_tokens, defaults.training_tokens, options.density, dtype, device,
                limits, seconds,
            )  # fmt: skip
            for section in chain([limits_section(setting)], *(SECTIONS[part](setting) for part in what)):
                tables.append(f"### {section.title}, {name}\n\n{section.table()}\n")
                print(tables[-1], flush=True)
                found.setdefault(section.key, []).extend(section.results)

    folder.mkdir(parents=True)
    (folder / "tables.md").write_text("\n".join(tables), encoding="utf-8")
    readings = watch.readings()
    if device.type == "cuda":
        readings.pop("peak_memory_gib")  # counted anew for every row, whose results have it
    record = {
        "mode": "bench",
        "command": options.command,
        "model": subject.name,
        "path": str(folder),
        "dataset": None,
        "dtype": dtypes[0],
        "seed": options.seed,
        "density_asked": options.density,
        "device": report.device_name(device),
        "peak_memory_gib": None,
        "versions": report.versions(),
        "plots": _draw(folder, found),
        **readings,
        **found,
    }
    write_json(folder / "bench.json", record)
    return record


def _what(given: str | None) -> tuple[str, ...]:
    if given not in (None, "all", *SECTIONS):
        raise UsageError(f"unknown --bench_what {given}: use one of {', '.join(SECTIONS)}, all")
    return tuple(SECTIONS) if given in (None, "all") else (given,)


def _subject(options: Namespace, defaults: Defaults) -> Subject:
    """--model_path is measured itself; else --model lends its shapes, or a LLaMA that suits the device."""
    if options.model_path not in (None, "original"):
        source = models.find_source(options.model_path)
        config = transformers.AutoConfig.from_pretrained(source.location, **source.arguments)
        density = None
        if getattr(config, "quantization_config", None):
            checkpoint = files.read_checkpoint(source.location)
            checkpoint.verify()
            density = checkpoint.record["density"]
            del config.quantization_config  # the dense model of the same shapes
        return Subject(source.name, config, density, partial(_load, source))
    if options.model is None:
        return Subject(defaults.shapes, transformers.LlamaConfig(**defaults.config))
    source = models.find_source(options.model)
    load = partial(_load, source) if options.model_path == "original" else None
    return Subject(source.name, models.load_config(source), load=load)


def _load(source: models.Source, dtype: torch.dtype, device: torch.device) -> Any:
    model: Any = models.load_model(source, dtype)
    return model.to(device)


def _shapes(options: Namespace, subject: Subject, defaults: Defaults) -> tuple[tuple[int, int], ...]:
    """Square layers as asked; else those of the model where one was named."""
    dims = options.bench_dims
    if dims is None and (options.model is not None or options.model_path is not None):
        return linear_shapes(subject.config)
    return tuple((d, d) for d in dims or defaults.dims)


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


def _draw(folder: Path, found: dict[str, list[Result]]) -> list[str]:
    """The PIFA paper's figures 4 and 5: speedup and memory over the dimension, and over the rank."""
    if "layer" not in found:
        return []
    if not plots.can_plot():
        log.warning("no plots without matplotlib: pip install -r %s", plots.REQUIREMENTS)
        return []
    square = [result for result in found["layer"] if result["d_out"] == result["d_in"]]
    drawn = []
    for name, label, key, results in [
        ("dimensions.png", "d", lambda r: r["d_in"], square),
        ("ranks.png", "r / d", lambda r: r["rank"] / r["d_in"], found["ranks"]),
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
        panels.append(Panel(f"{title}, {most} tokens, {shown[0]['dtype']}" if shown else title, label, title, lines))
    return panels if shown else []
