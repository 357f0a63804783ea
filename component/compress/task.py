"""A model that is about to be compressed: its layers and linears described, checked against what is asked of it."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from component.compress.estimate import Machine, estimate, waiting_batches
from component.compress.settings import Settings
from component.compress.workload import announce, shapes_of, work_of
from component.flow.batches import windows_at_once
from component.flow.means import Flows, Means
from component.flow.modules import modules_of
from component.ranks.allocation import ALLOCATIONS, mlp_density, uniform
from component.ranks.budget import Budget, Module
from component.solve.names import NARROWING
from utils.data import CalibrationWindows
from utils.layers import DecoderLayer, HeldLayers, LayerSource, describe_layers

log = logging.getLogger("pifa")


@dataclass(frozen=True, kw_only=True)
class Profiles:
    """Where profiles are kept, and of which model they are.

    folder: of the first pass, None for one named by its hash under `parent`. weights: fingerprint of the model.
    """

    parent: Path
    name: str
    weights: Any
    folder: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the planners and the walk work on. dtype: of the new layers' weights."""

    settings: Settings
    model: PreTrainedModel
    described: list[DecoderLayer]
    modules: list[Module]
    text: CalibrationWindows
    flows: Flows
    means: Means
    dtype: torch.dtype
    profiles: Profiles


def task_for(
    settings: Settings,
    model: PreTrainedModel,
    source: LayerSource,
    *,
    text: CalibrationWindows,
    machine: Machine,
    means: Means,
    dtype: torch.dtype,
    profiles: Profiles,
) -> Task:
    """Describe the model and say what compressing it takes.

    means: without the numbers of batches, which are found here. Raises: UsageError for a density that no ranks fit.
    """
    described = describe_layers(model, source)
    modules = modules_of(model, described)
    if settings.prune != NARROWING:
        check_budget(settings, modules)
    means = replace(means, batch=windows_at_once(settings.model_seq_len))
    flows = Flows(text.windows, whitening=settings.pruning_nsamples, reconstruction=settings.reconstruct_nsamples)
    shapes = shapes_of(model, described, modules)
    work = work_of(settings, modules, flows, batch=means.batch, processes=means.team.size)
    needs = estimate(shapes, work, machine, whole=isinstance(source, HeldLayers))
    announce(settings, modules, flows, device=means.device, needs=needs)
    means = replace(means, waiting=waiting_batches(shapes, work, machine))
    return Task(
        settings=settings,
        model=model,
        described=described,
        modules=modules,
        text=text,
        flows=flows,
        means=means,
        dtype=dtype,
        profiles=profiles,
    )


def check_budget(settings: Settings, modules: list[Module]) -> None:
    """Refuse what no ranks fit before the profile is made. Raises: UsageError."""
    if settings.allocation in ALLOCATIONS:
        uniform(Budget(modules, settings.density, settings.storage))
    if settings.attention_density is not None:
        mlp_density(modules, settings.density, settings.attention_density)
