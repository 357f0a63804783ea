"""Compress a model in memory, with the settings and by the driver of --mode m."""

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from component.checkpoint.entries import kind_of
from component.compress.estimate import Machine
from component.compress.job import read_calibration
from component.compress.pipeline import Pipeline, check_method, planned
from component.compress.settings import Settings
from component.compress.task import Profiles, task_for
from component.flow.means import Means
from component.format.integration import PIFAConfig
from component.modes import m, parser, shared
from utils import report
from utils.errors import UsageError
from utils.layers import HeldLayers
from utils.placement import Shelf, free_bytes

RECORD = "compression_record"  # attribute of a compressed model
SAMPLE = 4096  # numbers from either end of a tensor that a fingerprint reads


def compress_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    density: float = 0.8,
    dataset: str | None = None,
    prune: str = "svd-llm",
    device: str | None = None,
    **flags: Any,
) -> PreTrainedModel:
    """Replace the decoder linears of a model by low-rank factors, in place; returns the model.

    density: fraction of the linears' numbers that is left once the factors are pivoted, in (0,1]. dataset: calibration
    text, a name or a path; None for WikiText-2, offline the Python reference. prune: how, see docs/flags.md. device:
    what the work is done on, None for a GPU where there is one; the model ends where it was. flags: every other flag of
    `--mode m` by its name, such as `model_seq_len=512, pruning_nsamples=16, reconstruct_nsamples=16, seed=3`.

    The layers become LowRankLinear in the model's own dtype (W + M of PIFA, arXiv 2501.19090, its exact form).

    Raises: UsageError for a flag, a text or a model that can't be; RunError where numbers stop being finite.
    """
    given = {"density": density, "dataset": dataset, "prune": prune, "DEV": device, **flags}
    home = next(model.parameters()).device
    model.eval().requires_grad_(False)
    with plan_compression(model, tokenizer, **given) as pipeline:
        recipe, tuned = pipeline.choose()
        entries = pipeline.planner.entries(pipeline.planner.plan(recipe))
        described = pipeline.task.described
        for index, layer in pipeline.layers(recipe):
            model.set_submodule(described[index].name, layer.cpu())
    settings = pipeline.task.settings
    model.config.quantization_config = PIFAConfig(entries)
    record = {
        **settings.as_json(),
        "dataset": pipeline.task.text.dataset,
        "kind": kind_of(entries),
        "ranks_paid_for": settings.storage.name,
        **({"tuned": tuned} if tuned else {}),
    }
    note(model, record)
    nn.Module.to(model, home)
    return model


def note(model: PreTrainedModel, record: dict[str, Any]) -> None:
    """Keep what was done at the model, for the folder that it may be saved to."""
    vars(model)[RECORD] = record


def noted(model: PreTrainedModel) -> dict[str, Any] | None:
    """What was done to the model here; None for another one."""
    return vars(model).get(RECORD)


@contextlib.contextmanager
def plan_compression(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **flags: Any) -> Iterator[Pipeline]:
    """A pipeline for the model: `layers(recipe)` makes compressed layers, `judge(recipe)` their held-out perplexity.

    flags: of `--mode m`, by their names. The model stays as it is; it is on the CPU meanwhile, a layer at a time on
    the device. The profile is kept in `profiling_mat_path`, or as long as the block runs.

    Raises: UsageError for a flag, a text or a model that can't be.
    """
    options = options_of(flags)
    settings = settings_for(model, options)
    check_method(settings, processes=1)
    device = torch.device(options.DEV)
    model.cpu()
    with tempfile.TemporaryDirectory() as temporary:
        profile = options.profiling_mat_path
        profiles = Profiles(
            parent=Path(temporary),
            name="model",
            weights=fingerprint(model) if profile else None,
            folder=None if profile is None else Path(profile),
        )
        source, shelf = HeldLayers(model), Shelf.of(options.host_memory, Path(temporary))
        task = task_for(
            settings,
            model,
            source,
            text=read_calibration(settings, tokenizer),
            machine=Machine(free_bytes(device), shelf.limit, report.resident_memory()),
            means=Means(device, source, shelf=shelf),
            dtype=model.dtype,
            profiles=profiles,
        )
        yield planned(task)


def options_of(flags: dict[str, Any]) -> parser.Options:
    """Checked flags of --mode m with their defaults. Raises: UsageError."""
    if isinstance(flags.get("dataset"), str):
        flags = {**flags, "dataset": [flags["dataset"]]}
    options = parser.from_keywords(m.FLAGS, flags)
    m.complete(options)
    shared.fill_device(options)
    parser.fill(options, m.FLAGS)
    return options


def settings_for(model: nn.Module, options: parser.Options) -> Settings:
    """Raises: UsageError for a model that is compressed already."""
    config: Any = model.config
    if getattr(config, "quantization_config", None) is not None:
        raise UsageError("the model is compressed or quantized already: take the original one")
    options.model = config.name_or_path or type(model).__name__
    return m.settings_of(options)


def fingerprint(model: nn.Module) -> str:
    """sha256 of the names and shapes of all parameters, and of numbers from both ends of each."""
    digest = hashlib.sha256()
    for name, tensor in model.named_parameters():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().flatten()
        for part in (flat[:SAMPLE], flat[-SAMPLE:]):
            digest.update(part.float().cpu().numpy().tobytes())
    return digest.hexdigest()
