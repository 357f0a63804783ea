"""Stages of fine-tuning: which factors are trained together, and the training of one stage after the other.

LoRA as SVD-LLM (arXiv 2403.07378) does it, on one factor of every product and then on the other, or on both at once;
or all numbers of the factors (PIFA, arXiv 2501.19090, appendix B.3). Low-rank and pivoted layers are trained alike,
folded or not: what a layer stores of its weight are two nn.Linear in either case. All else stays as it is, to the bit.
"""

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from component.checkpoint.choose import model_in
from component.checkpoint.reading import Checkpoint
from component.finetune import lora, state
from component.finetune.loop import Point, Schedule, Training
from component.finetune.material import Batches, Material
from component.finetune.settings import Settings
from component.format.integration import FACTORS
from utils import models, report
from utils.errors import UsageError
from utils.sources import Source

log = logging.getLogger("pifa")


class Stage(NamedTuple):
    """Names of the nn.Linear that are trained together."""

    name: str
    linears: list[str]


def stages_of(order: str, layers: dict[str, dict[str, Any]]) -> list[Stage]:
    """layers: the entries of the quantization config. Dense linears are in no stage, nor are C of no rows.

    Raises: UsageError where nothing is left.
    """
    last, first = [], []
    for name, entry in layers.items():
        if entry["kind"] in FACTORS:
            inner, outer = FACTORS[entry["kind"]]
            if entry["kind"] == "lowrank" or entry["out_features"] > entry["rank"]:
                last.append(f"{name}.{outer}")
            first.append(f"{name}.{inner}")
    if not first:
        raise UsageError("this checkpoint has no factors to train: all its linears are dense, or have fewer channels")
    if order == "sequential":
        stages = [Stage("coefficients", last), Stage("pivots", first)]
        return [stage for stage in stages if stage.linears]
    return [Stage("factors", last + first)]


def tune(
    settings: Settings,
    source: Checkpoint,
    stages: list[Stage],
    *,
    material: Material,
    teacher: Source | None,
    folder: Path,
) -> tuple[dict[str, list[Point]], dict[str, Tensor]]:
    """Run the stages, or what an earlier run left of them: loss curves by stage, and the new factors by name.

    teacher: whose distributions are learned, where there is one; folder: where states are kept.
    """
    steps = settings.steps(sum(material.counts))
    progress, tensors = state.load_progress(folder)
    curves = progress.curves
    model = load_trainable(source, torch.device(settings.request.device), stages)
    taught_by: Any = None
    if teacher:
        taught_by = models.load_model(teacher, models.DTYPES[settings.compute_dtype])
        taught_by = taught_by.to(settings.request.device).eval().requires_grad_(False)
    if settings.gradient_checkpointing:
        # the newer name comes first; the older one is going
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    factors = state.load_merged(folder) if progress.stage else {}
    put(model, factors)
    for number, stage in enumerate(stages):
        if number < progress.stage:
            continue
        training = begin(model, stage, settings, steps=steps)
        training.teacher = taught_by
        if tensors:
            training.restore(tensors, curves[stage.name])
            tensors = {}  # as large as the training itself
        curves[stage.name] = training.curve
        save = functools.partial(state.save_progress, folder, state.Progress(number, curves), training)
        training.run(Batches(material, settings, training.schedule), save, settings.save_steps)
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
    model: Any = models.load_model(model_in(source), torch.float32)
    for stage in stages:
        for name in stage.linears:
            if type(model.get_submodule(name)) is not nn.Linear:
                raise UsageError(f"{source.folder}: {name} is stored in a form that can't be trained")
    return model.to(device)


def begin(model: Any, stage: Stage, settings: Settings, *, steps: int) -> Training:
    """A training of the stage at its first step: of adapters on its linears, or of their weights."""
    schedule = Schedule(
        steps=steps,
        learning_rate=settings.learning_rate,
        warmup_ratio=settings.warmup_ratio,
        compute_dtype=models.DTYPES[settings.compute_dtype],
        seed=f"{settings.seed} {stage.name}",
    )
    if settings.order == "full":
        parameters = {f"{name}.weight": model.get_parameter(f"{name}.weight") for name in stage.linears}
        for parameter in parameters.values():
            parameter.requires_grad_(True)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            model = lora.add_adapters(
                model,
                stage.linears,
                rank=settings.lora_r,
                alpha=settings.lora_alpha,
                dropout=settings.lora_dropout,
            )
        parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    trained = sum(parameter.numel() for parameter in parameters.values())
    held = sum(parameter.numel() for parameter in model.parameters())
    log.info(
        "%s: %d steps of %d rows train %d numbers of %d; weights, gradients and optimiser take %.2f GiB",
        stage.name, steps, settings.batch_size, trained, held, 4 * (held + 3 * trained) / report.GIB,
    )  # fmt: skip
    return Training(model, parameters, schedule)
