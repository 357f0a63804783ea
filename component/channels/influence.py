"""--mode bi: how far each decoder layer turns the hidden states, saved, and the widths that follow from it.

FLAT-LLM (arXiv 2505.23966) gives a layer channels in proportion to this angle. One forward pass measures it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from component.channels.narrowing import narrow_plan
from component.channels.parts import parts_of
from component.channels.settings import InfluenceSettings
from component.checkpoint.writer import check_target, refuse_existing
from component.flow.batches import windows_at_once
from component.flow.modules import modules_of
from component.ranks.sizes import Plan, numbers_of
from component.solve.sensitivity import angular_influence
from utils import data, models, report, sources
from utils.errors import RunError, UsageError
from utils.layers import DecoderLayer, LayerSource, advance, describe_layers, layer_inputs, map_tensors
from utils.placement import Shelf
from utils.precision import full_precision
from utils.source_weights import open_model
from utils.whole_files import hash_of, read_json, write_json

FORMAT_VERSION = 1


def block_influence(
    model: PreTrainedModel,
    described: list[DecoderLayer],
    windows: Tensor,
    *,
    device: torch.device,
    source: LayerSource,
    shelf: Shelf | None = None,
) -> list[float]:
    """By layer, the mean angle over pi between its input and output, over all tokens of windows (count, length).

    Raises: RunError naming the layer whose output is not finite.
    """
    shelf, batch = shelf or Shelf(), windows_at_once(windows.shape[1])
    states, keywords = layer_inputs(model, windows, lambda size: shelf.room(2 * size, device))
    before = shelf.room(2 * states.nbytes, device)(states.shape, states.dtype)
    found = []
    for layer, given in zip(described, keywords, strict=True):
        kwargs = map_tensors(given, lambda tensor: tensor.to(device))
        before.copy_(states)
        with source.filled(layer.name, device) as module, torch.no_grad(), full_precision():
            advance(module, states, kwargs, batch=batch)
        parts = zip(before.split(batch), states.split(batch), strict=True)
        found.append(sum(angular_influence(*part) * len(part[0]) for part in parts) / len(windows))
        if not torch.isfinite(torch.tensor(found[-1])):
            raise RunError(f"the output of {layer.name} is not finite")
    return found


def write_influence(path: Path, influence: list[float], settings: dict[str, Any]) -> None:
    """As JSON: {"format_version": 1, "influence": [a number for each layer], ...}. Raises: UsageError where it exists.

    settings: what else the file says, of how the numbers came about.
    """
    check_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"format_version": FORMAT_VERSION, "influence": influence, **settings})


def check_new(path: Path) -> None:
    """Raises: UsageError where the file exists, or can't be made."""
    refuse_existing(path, "choose another --bi_score, or move it away")
    check_target(path, "", False)


def read_influence(path: Path, layers: int) -> list[float]:
    """Raises: UsageError where the file is no such file, or of a model with another number of layers."""
    if not path.is_file():
        raise UsageError(f"no such file: {path}; --mode bi makes one")
    content = read_json(path)
    influence = content.get("influence")
    if content.get("format_version") != FORMAT_VERSION or not isinstance(influence, list):
        raise UsageError(f"{path} holds no influence of layers: --mode bi writes such a file")
    if not all(type(value) in (int, float) and 0 <= value <= 1 for value in influence):
        raise UsageError(f"{path}: the influence of a layer is a number in [0,1]")
    if len(influence) != layers:
        raise UsageError(f"{path} is of a model with {len(influence)} layers, and this one has {layers}")
    return [float(value) for value in influence]


@dataclass(frozen=True)
class _Measured:
    """widths: by layer, (channels of a head, channels of the MLP), "dense" where all are left."""

    influence: list[float]
    plan: Plan
    widths: list[tuple[int | str, int | str]]


def measure_influence(settings: InfluenceSettings) -> dict[str, Any]:
    """Measure, save and print; returns the result record.

    Raises: UsageError where the file exists, or the density leaves a layer nothing; RunError where a layer's output is
    not finite.
    """
    device = torch.device(settings.device)
    watch = report.Stopwatch(device)
    source = sources.find_source(settings.model)
    path = Path(settings.bi_score or f"{settings.save_path}/{settings.prefix}{source.name}-bi.json")
    check_new(path)
    config = models.load_config(source)
    dtype = settings.dtype or models.default_dtype_name(source, config, device)
    dataset, windows, _ = data.calibration_windows(
        models.load_tokenizer(source),
        settings.dataset,
        count=settings.reconstruct_nsamples,
        length=settings.model_seq_len,
        seed=settings.seed,
        held_out=settings.heldout_nsamples,
    )
    model, layers = open_model(source, models.DTYPES[dtype])
    measured = _measured(model, layers, windows, device=device, density=settings.density)
    how = {
        "model": settings.model,
        "dataset": dataset,
        "windows_sha256": hash_of(windows.tolist()),
        "dtype": dtype,
        "seed": settings.seed,
    }
    write_influence(path, measured.influence, how)
    both = enumerate(zip(measured.influence, measured.widths, strict=True))
    rows = [[index, f"{score:.4f}", *widths] for index, (score, widths) in both]
    print(report.markdown_table(["layer", "influence", "channels of a head", "channels of the MLP"], rows))
    return {
        "mode": "bi",
        "command": settings.command,
        "path": str(path),
        "density_asked": settings.density,
        **how,
        "influence": measured.influence,
        "ranks": numbers_of(measured.plan),
        **watch.readings(),
    }


def _measured(
    model: PreTrainedModel, layers: LayerSource, windows: Tensor, *, device: torch.device, density: float
) -> _Measured:
    described = describe_layers(model, layers)
    modules = modules_of(model, described)
    parts = [parts_of(model.get_submodule(layer.name), layer) for layer in described]
    influence = block_influence(model, described, windows, device=device, source=layers)
    plan = narrow_plan(modules, described, parts, density=density, influence=influence)

    def shown(layer: DecoderLayer, name: str) -> int | str:
        return plan[f"{layer.name}.{name}"].number or "dense"

    both = zip(described, parts, strict=True)
    return _Measured(influence, plan, [(shown(layer, part.value), shown(layer, part.down)) for layer, part in both])
