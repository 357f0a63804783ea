"""--mode bi: how far each decoder layer turns the hidden states, saved, and the widths that follow from it.

FLAT-LLM (arXiv 2505.23966) gives a layer channels in proportion to this angle. One forward pass measures it.
"""

import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from component.channels.narrowing import narrow_plan
from component.channels.parts import parts_of
from component.checkpoint.writer import check_target
from component.flow.modules import modules_of
from component.ranks.sizes import numbers_of
from component.solve.sensitivity import angular_influence
from utils import data, models, report
from utils.errors import RunError, UsageError
from utils.layers import DecoderLayer, LayerSource, advance, describe_layers, layer_inputs, map_tensors
from utils.placement import Shelf
from utils.precision import full_precision
from utils.source_weights import open_model
from utils.whole_files import hash_of, read_json, write_json

log = logging.getLogger("pifa")

FORMAT_VERSION = 1
BATCH_TOKENS = 8192  # that go through a layer at once


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
    shelf, batch = shelf or Shelf(), max(1, BATCH_TOKENS // windows.shape[1])
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
    if path.exists():
        raise UsageError(f"{path} exists and nothing is ever overwritten: choose another --bi_score, or move it away")
    check_target(path, "", False)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"format_version": FORMAT_VERSION, "influence": influence, **settings})


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


def run(options: Namespace) -> dict[str, Any]:
    """Measure, save and print; returns the result record."""
    device = torch.device(options.DEV)
    watch = report.Stopwatch(device)
    source = models.find_source(options.model)
    path = Path(getattr(options, "bi_score", None) or f"{options.save_path}/{options.prefix}{source.name}-bi.json")
    if path.exists():
        raise UsageError(f"{path} exists and nothing is ever overwritten: choose another --bi_score, or move it away")
    check_target(path, "", False)
    config = models.load_config(source)
    dtype = options.dtype or models.default_dtype_name(source, config, device)
    text = data.read_text(options.dataset[0] if options.dataset else None, "train")
    tokens = data.tokenize(models.load_tokenizer(source), text.text)
    tokens, _ = data.hold_out(tokens, options.heldout_nsamples, options.model_seq_len)
    windows = data.random_windows(tokens, options.reconstruct_nsamples, options.model_seq_len, seed=options.seed)
    model, layers = open_model(source, models.DTYPES[dtype])
    described, influence = describe_layers(model, layers), []
    modules = modules_of(model, described)
    parts = [parts_of(model.get_submodule(layer.name), layer) for layer in described]
    influence = block_influence(model, described, windows, device=device, source=layers)
    plan = narrow_plan(modules, described, parts, density=options.density, influence=influence)
    settings = {
        "model": options.model,
        "dataset": text.name,
        "windows_sha256": hash_of(windows.tolist()),
        "dtype": dtype,
        "seed": options.seed,
    }
    write_influence(path, influence, settings)
    names = [(f"{layer.name}.{p.value}", f"{layer.name}.{p.down}") for layer, p in zip(described, parts, strict=True)]
    rows = [
        [index, f"{score:.4f}", *(plan[name].number or "dense" for name in both)]
        for index, (score, both) in enumerate(zip(influence, names, strict=True))
    ]
    print(report.markdown_table(["layer", "influence", "channels of a head", "channels of the MLP"], rows))
    return {
        "mode": "bi",
        "command": options.command,
        "path": str(path),
        "density_asked": options.density,
        **settings,
        "influence": influence,
        "ranks": numbers_of(plan),
        **watch.readings(),
    }
