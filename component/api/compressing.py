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

from component.checkpoint.entries import kind_of, paid_for
from component.compress.estimate import Machine
from component.compress.job import read_calibration, settings_in_record
from component.compress.pipeline import Pipeline, check_method, planned
from component.compress.recipe import choice_in_record
from component.compress.settings import Settings
from component.compress.task import Profiles, task_for
from component.flow.means import Means
from component.format.integration import PIFAConfig
from component.modes import m, parser, shared
from utils import report
from utils.attention import repeat_heads
from utils.errors import UsageError
from utils.layers import HeldLayers
from utils.placement import Shelf, free_bytes

NOTE = "compression_record"  # attribute of a compressed model
# flags of --mode m that mean nothing for a model in memory, and what does
ELSEWHERE = {
    "model": "the model itself is given",
    "dtype": "convert the model with model.to(dtype) first",
    "save_path": "save_model takes the folder",
    "prefix": "save_model takes the folder",
    "resume": "nothing is written that could be gone on with",
}
SAMPLE = 4096  # numbers from either end of a tensor that a fingerprint reads


def compress_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    density: float | None = None,
    dataset: str | None = None,
    prune: str = "svd-llm",
    device: str | None = None,
    **flags: Any,
) -> PreTrainedModel:
    """Replace the decoder linears of a model by low-rank factors, in place; returns the model.

    density: fraction of the linears' numbers that is left once the factors are pivoted, in (0,1]; None for 0.8.
    dataset: calibration text, a name or a path; None for WikiText-2, offline the Python reference. prune: how, see
    docs/flags.md. device: what the work is done on, None for a GPU where there is one. flags: every other flag of
    `--mode m` by its name, such as `model_seq_len=512, pruning_nsamples=16, reconstruct_nsamples=16, seed=3`.

    The model is put into eval mode, without gradients; an error leaves it otherwise as it was, and where it was. The
    layers become LowRankLinear in the model's own dtype (W + M of PIFA, arXiv 2501.19090, its exact form).

    Raises: UsageError for a flag, a text or a model that can't be; RunError where numbers stop being finite.
    """
    named = {"density": density, "dataset": dataset, "prune": prune, "DEV": device, **flags}
    model.eval().requires_grad_(False)
    with plan_compression(model, tokenizer, **named) as pipeline:
        recipe, tuned = pipeline.choose()
        design = pipeline.design(recipe)
        layers = [layer.cpu() for _, layer in pipeline.layers(design)]
    task, home = pipeline.task, next(model.parameters()).device
    # all at once, now that nothing can fail any more
    for described, layer in zip(task.described, layers, strict=True):
        model.set_submodule(described.name, layer.to(home))
    record = {
        **settings_in_record(task.settings, task.text, config=model.config, dtype=task.dtype),
        **choice_in_record(recipe, tuned),
        "kind": kind_of(design.entries),
        "ranks_paid_for": paid_for(design.entries, task.settings.storage),
    }
    model.config.quantization_config = PIFAConfig(design.entries)
    note(model, record)
    return model


def note(model: PreTrainedModel, record: dict[str, Any]) -> None:
    """Keep what was done at the model, for the folder that it may be saved to."""
    vars(model)[NOTE] = record


def noted(model: PreTrainedModel) -> dict[str, Any] | None:
    """What was done to the model here; None for another one."""
    return vars(model).get(NOTE)


@contextlib.contextmanager
def plan_compression(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **flags: Any) -> Iterator[Pipeline]:
    """A pipeline for the model: `choose()` a recipe, `design(recipe)` a plan, `layers(design)` the layers.

    flags: of `--mode m`, by their names. The model stays as it is. Inside the block it is on the CPU, a layer at a time
    on the device. The profile is kept in `profiling_mat_path`, or as long as the block runs.

    Raises: UsageError for a flag, a text or a model that can't be.
    """
    options = options_of(flags)
    settings = settings_for(model, options)
    check_method(settings, processes=1)
    text = read_calibration(settings, tokenizer)
    device = torch.device(options.DEV)
    with _on_cpu(model, device), tempfile.TemporaryDirectory() as temporary:
        kept = options.profiling_mat_path
        profiles = Profiles(
            parent=Path(temporary),
            name="model",
            weights=sampled_hash(model) if kept else None,
            folder=Path(kept) if kept else None,
        )
        source, shelf = HeldLayers(model), Shelf.of(options.host_memory, Path(temporary))
        task = task_for(
            settings,
            model,
            source,
            text=text,
            machine=Machine(free_bytes(device), shelf.limit, report.resident_memory()),
            means=Means(device, source, shelf=shelf),
            dtype=model.dtype,
            profiles=profiles,
        )
        yield planned(task)


@contextlib.contextmanager
def _on_cpu(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """Inside, the model is on the CPU and attends as suits the device; then it is where it was, and as it was."""
    home, attention = next(model.parameters()).device, model.config._attn_implementation
    nn.Module.to(model, "cpu")
    if device.type == "cuda":
        repeat_heads(model)
    try:
        yield
    finally:
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)
        nn.Module.to(model, home)


def options_of(flags: dict[str, Any]) -> parser.Options:
    """Checked flags of --mode m with their defaults. Raises: UsageError."""
    useless = [f"{name}: {why}" for name, why in ELSEWHERE.items() if flags.get(name) is not None]
    if useless:
        raise UsageError(f"compress_model has no {useless[0]}")
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


def sampled_hash(model: nn.Module) -> str:
    """sha256 of the names and shapes of all parameters, and of numbers from both ends of each."""
    digest = hashlib.sha256()
    for name, tensor in model.named_parameters():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().flatten()
        for part in (flat[:SAMPLE], flat[-SAMPLE:]):
            digest.update(part.float().cpu().numpy().tobytes())
    return digest.hexdigest()
