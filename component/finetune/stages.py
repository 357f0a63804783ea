"""--mode finetune: train the factors of a checkpoint on text, and write a checkpoint of the same format.

LoRA as SVD-LLM (arXiv 2403.07378) does it, on one factor of every product and then on the other, or on both at once;
or all numbers of the factors (PIFA, arXiv 2501.19090, appendix B.3). Low-rank and pivoted layers are trained alike,
folded or not: what a layer stores of its weight are two nn.Linear in either case. All else stays as it is, to the bit.
"""

import functools
import logging
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import component.format.integration  # noqa: F401  (teaches transformers to load checkpoints)
from component.checkpoint import reading as files
from component.checkpoint.counting import densities
from component.checkpoint.reading import Checkpoint
from component.checkpoint.writer import CheckpointWriter, check_target
from component.finetune import data as rows_of
from component.finetune import lora, state
from component.finetune.data import Batch, Row, Share
from component.finetune.loop import Point, Recipe, Training
from component.finetune.self_text import written_rows
from component.finetune.settings import Settings, compute_dtype, read_settings
from component.ranks.cost import LOW_RANK, PIVOTED
from utils import models, plots, report, sources
from utils.endings import one_line_endings
from utils.errors import RunError, UsageError
from utils.models import fingerprint
from utils.whole_files import hash_of, write_json

log = logging.getLogger("pifa")

CURVES, PLOT = "finetune.json", "finetune.png"
PARTS = 20  # of a loss curve in the plot and in the record
# kind of layer -> its factors: the one that is applied last, as U is in U V x, then the one before
FACTORS = {"lowrank": ("u", "v"), "pifa": ("coeff", "pivot")}


class Stage(NamedTuple):
    """Names of the nn.Linear that are trained together."""

    name: str
    linears: list[str]


@dataclass(frozen=True)
class Material:
    """The rows of every source of the mixture, and the sources' shares of it."""

    names: list[str]
    rows: list[list[Row]]
    weights: list[float]

    @property
    def counts(self) -> list[int]:
        return [len(rows) for rows in self.rows]

    def described(self, total: int) -> list[dict[str, Any]]:
        """For the record, of a stage that draws `total` rows: how often it sees each source as a whole."""
        quotas = rows_of.quotas(self.weights, total)
        return [
            {"name": name, "rows": count, "weight": weight, "passes": round(quota / count, 3)}
            for name, count, weight, quota in zip(self.names, self.counts, self.weights, quotas, strict=True)
        ]


@one_line_endings()
def run(options: Namespace) -> dict[str, Any]:
    """Fine-tune the checkpoint at --model_path into `<its name>-ft-<8 hex>`; returns the result record.

    Raises: UsageError for flags, data or checkpoints that can't be, RunError where numbers stop being finite.
    """
    watch = report.Stopwatch(torch.device(options.DEV))
    settings = read_settings(options)
    if settings.order != "full":
        lora.check_installed(settings.order)
    shares = rows_of.parse_mixture(settings.data_path)
    source = find_checkpoint(options)
    teacher = find_teacher(settings.teacher, source)
    stages = stages_of(settings.order, source.layers)
    tokenizer = models.load_tokenizer(sources.Source(source.folder.name, str(source.folder)))
    material = read_material(shares, tokenizer, settings.cutoff_len)
    if teacher and rows_of.SELF in material.names:
        material = with_own_text(material, teacher, settings, options)
    dtype = options.dtype or source.record["dtype"]
    data_hash = hash_of([rows_of.hash_of_rows(rows) for rows in material.rows])
    flags_hash = hash_of({"source": source.manifest, "dtype": dtype, "data": data_hash, **settings.as_json()})
    folder = Path(options.save_path) / f"{options.prefix}{source.folder.resolve().name}-ft-{flags_hash[:8]}"
    check_target(folder, flags_hash, options.resume)
    if record := files.finished_record(folder):
        state.remove_state(folder)
        return record
    source.verify()

    with CheckpointWriter(folder, flags_hash, options.resume) as writer:
        steps = settings.steps(sum(material.counts))
        used = material.described(steps * settings.batch_size)
        log.info("data: %s", ", ".join(f"{entry['name']} {entry['passes']:g} times" for entry in used))
        writer.settle({"steps": steps})  # from here on the folder outlives a run that is ended
        curves, factors = tune(options, settings, source, teacher, stages, material, folder)
        write_curves(folder, curves)
        write_weights(writer, source, factors, models.DTYPES[dtype])
        written = {*source.manifest["shards"], files.MANIFEST, files.RECORD, files.INDEX, "config.json", CURVES, PLOT}
        beside = [path for path in source.folder.iterdir() if path.is_file() and path.name not in written]
        writer.describe(
            {**source.config, "dtype": dtype}, sorted(path for path in beside if not path.name.startswith("."))
        )
        skipped = {stage: sum(point["loss"] is None for point in curve) for stage, curve in curves.items()}
        storage = PIVOTED if source.record["use_pifa"] else LOW_RANK
        record = {
            **source.record,
            "mode": "finetune",
            "command": options.command,
            "source": str(source.folder),
            "path": str(folder),
            "dtype": dtype,
            "finetune": {
                **settings.as_json(),
                "steps": steps,
                "skipped_steps": skipped,
                "data": used,
                "data_sha256": data_hash,
            },
            "losses": {stage: parts_of(curve) for stage, curve in curves.items()},
            **watch.readings(),
            **densities(folder, source.layers, ranks_paid_for=storage.name, asked=source.record["density_asked"]),
            "device": report.device_name(watch.device),
            "versions": report.versions(),
        }
        sealed = writer.seal(record)
        state.remove_state(folder)
        return sealed


def find_checkpoint(options: Namespace) -> Checkpoint:
    """What --model_path names; without it the newest one under --save_path, or what that was made from.

    Raises: UsageError where there is none, or it is quantized.
    """
    if options.model_path == "original":
        raise UsageError("--mode finetune trains factors, which the original model has not: run --mode m first")
    if options.model_path is not None:
        named = files.read_checkpoint(options.model_path)
        if named.kind == "quantized":
            raise UsageError(f"{named.folder} is quantized: fine-tune {named.record['source']} and quantize again")
        return named
    found = files.newest_checkpoint(Path(options.save_path), None)
    while found.record["mode"] in ("finetune", "quantize"):
        found = files.read_checkpoint(found.record["source"])
    return found


def stages_of(order: str, layers: dict[str, dict[str, Any]]) -> list[Stage]:
    """layers: the entries of the quantization config. Dense linears are in no stage, nor are C of no rows.

    Raises: UsageError where nothing is left.
    """
    last, first = [], []
    for name, entry in layers.items():
        if entry["kind"] in FACTORS:
            outer, inner = FACTORS[entry["kind"]]
            if entry["kind"] == "lowrank" or entry["out_features"] > entry["rank"]:
                last.append(f"{name}.{outer}")
            first.append(f"{name}.{inner}")
    if not first:
        raise UsageError("this checkpoint has no factors to train: all its linears are dense, or have fewer channels")
    if order == "sequential":
        stages = [Stage("coefficients", last), Stage("pivots", first)]
        return [stage for stage in stages if stage.linears]
    return [Stage("factors", last + first)]


def read_material(shares: Sequence[Share], tokenizer: Any, length: int) -> Material:
    """`self` is left empty."""
    rows = [[] if share.name == rows_of.SELF else rows_of.read_rows(share.name, tokenizer, length) for share in shares]
    weights = [share.weight or len(found) for share, found in zip(shares, rows, strict=True)]
    return Material([share.name for share in shares], rows, weights)


def find_teacher(name: str | None, source: Checkpoint) -> sources.Source | None:
    """`original` is what the checkpoint was made from. Raises: UsageError where it has other words."""
    if name is None:
        return None
    teacher = sources.find_source(source.record["model"] if name == "original" else name)
    words, known = models.load_config(teacher).vocab_size, source.config["vocab_size"]
    if words != known:
        raise UsageError(f"--teacher {name} has {words} words and {source.folder} {known}: it can't teach that")
    return teacher


def with_own_text(material: Material, teacher: sources.Source, settings: Settings, options: Namespace) -> Material:
    """The rows of `self`, as many as its share of a stage needs, kept in a file under --save_path."""
    assert settings.max_steps is not None
    place = material.names.index(rows_of.SELF)
    count = rows_of.quotas(material.weights, settings.max_steps * settings.batch_size)[place]
    if not count:
        raise UsageError(f"the share of {rows_of.SELF} in --data_path is less than a row of all steps: leave it out")
    dtype, given = compute_dtype(settings), [row for rows in material.rows for row in rows]
    decisive = [fingerprint(teacher), rows_of.hash_of_rows(given), count, settings.cutoff_len, settings.seed]
    name = f"{options.prefix}{teacher.name}-self-{hash_of([*decisive, str(dtype)])[:8]}.safetensors"

    def load() -> Any:
        return models.load_model(teacher, dtype).to(options.DEV)

    own = written_rows(Path(options.save_path) / name, load, given, count, settings.cutoff_len, settings.seed)
    rows = [own if index == place else rows for index, rows in enumerate(material.rows)]
    return Material(material.names, rows, material.weights)


def tune(
    options: Namespace,
    settings: Settings,
    source: Checkpoint,
    teacher: sources.Source | None,
    stages: list[Stage],
    material: Material,
    folder: Path,
) -> tuple[dict[str, list[Point]], dict[str, Tensor]]:
    """Run the stages, or what an earlier run left of them: loss curves by stage, and the new factors by name."""
    steps = settings.steps(sum(material.counts))
    progress, tensors = state.load_progress(folder)
    curves = progress.curves
    model = load_trainable(source, torch.device(options.DEV), stages)
    taught_by = None
    if teacher:
        taught_by = models.load_model(teacher, compute_dtype(settings)).to(options.DEV).eval().requires_grad_(False)
    if options.gradient_checkpointing:
        # the newer name comes first; the older one is going
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    factors = state.load_merged(folder) if progress.stage else {}
    put(model, factors)
    for number, stage in enumerate(stages):
        if number < progress.stage:
            continue
        training = begin(model, stage, settings, steps)
        training.teacher = taught_by
        if tensors:
            training.restore(tensors, curves[stage.name])
            tensors = {}  # as large as the training itself
        curves[stage.name] = training.curve
        save = functools.partial(state.save_progress, folder, state.Progress(number, curves), training)
        training.run(Batches(material, settings, training.recipe), save, options.save_steps)
        if settings.order != "full":
            model = lora.merge(training.model)
        model.requires_grad_(False)
        factors |= {f"{name}.weight": model.get_parameter(f"{name}.weight").detach() for name in stage.linears}
        if stage is not stages[-1]:
            state.save_merged(folder, factors)
            state.save_progress(folder, state.Progress(number + 1, curves), None)
    return curves, factors


@torch.no_grad()
def put(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        model.get_parameter(name).copy_(tensor)


def load_trainable(source: Checkpoint, device: torch.device, stages: Sequence[Stage]) -> Any:
    """The model in float32 on its device, nothing in it trainable yet. Raises: UsageError where a factor is missing."""
    model: Any = models.load_model(sources.Source(source.folder.name, str(source.folder)), torch.float32)
    for stage in stages:
        for name in stage.linears:
            if type(model.get_submodule(name)) is not nn.Linear:
                raise UsageError(f"{source.folder}: {name} is stored in a form that can't be trained")
    return model.to(device)


def begin(model: Any, stage: Stage, settings: Settings, steps: int) -> Training:
    """A training of the stage at its first step: of adapters on its linears, or of their weights."""
    seed = f"{settings.seed} {stage.name}"
    recipe = Recipe(steps, settings.learning_rate, settings.warmup_ratio, compute_dtype(settings), seed)
    if settings.order == "full":
        parameters = {f"{name}.weight": model.get_parameter(f"{name}.weight") for name in stage.linears}
        for parameter in parameters.values():
            parameter.requires_grad_(True)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            model = lora.add_adapters(model, stage.linears, settings.lora_r, settings.lora_alpha, settings.lora_dropout)
        parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    trained = sum(parameter.numel() for parameter in parameters.values())
    held = sum(parameter.numel() for parameter in model.parameters())
    log.info(
        "%s: %d steps of %d rows train %d numbers of %d; weights, gradients and optimiser take %.2f GiB",
        stage.name, steps, settings.batch_size, trained, held, 4 * (held + 3 * trained) / report.GIB,
    )  # fmt: skip
    return Training(model, parameters, recipe)


class Batches:
    """The micro-batches of a step, by its number."""

    def __init__(self, material: Material, settings: Settings, recipe: Recipe):
        self.material, self.settings = material, settings
        total = recipe.steps * settings.batch_size
        self.drawn = rows_of.draw(material.counts, material.weights, total, recipe.seed)

    def __call__(self, step: int) -> list[Batch]:
        size, micro = self.settings.batch_size, self.settings.micro_batch_size
        rows = [self.material.rows[source][row] for source, row in self.drawn[step * size : (step + 1) * size]]
        return [rows_of.collate(rows[start : start + micro]) for start in range(0, size, micro)]


def parts_of(curve: Sequence[Point]) -> list[list[Any]]:
    """The curve in at most PARTS parts: the last step of each and the mean loss of its steps that counted."""
    size = max(1, -(-len(curve) // PARTS))
    parts = []
    for start in range(0, len(curve), size):
        losses = [point["loss"] for point in curve[start : start + size] if point["loss"] is not None]
        last = curve[start : start + size][-1]["step"]
        parts.append([last, sum(losses) / len(losses) if losses else None])
    return parts


def write_curves(folder: Path, curves: dict[str, list[Point]]) -> None:
    write_json(folder / CURVES, curves)
    if not plots.can_plot():
        log.warning("no plot of the loss without matplotlib: pip install -r %s", plots.REQUIREMENTS)
        return
    panels = [
        plots.Panel(
            stage, "step", "loss", {"mean since the last point": [(x, y) for x, y in parts_of(curve) if y is not None]}
        )
        for stage, curve in curves.items()
    ]
    plots.draw_panels(folder / PLOT, panels)


@torch.no_grad()
def write_weights(writer: CheckpointWriter, source: Checkpoint, factors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """The source's shards with the new factors in place of the old.

    Raises: RunError for a factor that `dtype` can't hold.
    """
    for shard in sorted(source.manifest["shards"]):
        if writer.finished(shard):
            continue
        tensors = files.open_shard(source.folder / shard)
        for name in tensors.keys() & factors.keys():
            tensors[name] = factors[name].cpu()
        stored = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
        for name in tensors.keys() & factors.keys():
            if not stored[name].isfinite().all():
                raise RunError(f"{name} is not finite in {dtype}: write it as bfloat16 or float32")
        writer.write(shard, stored)
