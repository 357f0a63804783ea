"""--mode quantize: the factors of a checkpoint as integers of 4 or 8 bits, by GPTQ or rounding to nearest.

True sequential: layer after layer, and in a layer one group of linears with the same input after the other, each with
the inputs that the model has with everything before it quantized. Of a product the factor that sees the input comes
first (pivot rows, or V); the other one (coefficients, or U) is fitted to what the rounded first one gives, then
rounded for that. Dense linears are quantized like a single factor. Embeddings, norms and head stay as they are.
"""

import logging
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from component import integration
from component.folder import is_narrow, loader_files, rest_of
from component.gptq import Quantized, gptq, gptq_together, refit, round_to_nearest
from component.lockstep import lockstep
from component.moments import add_product, full_precision
from component.packed import PackedLinear
from component.streaming import advance
from utils import checkpoint as files
from utils import data, models, packing, report
from utils.checkpoint import Checkpoint, CheckpointWriter
from utils.endings import one_line_endings
from utils.errors import UsageError
from utils.layers import DecoderLayer, HeldLayers, describe_layers, layer_inputs, map_tensors
from utils.placement import Shelf

log = logging.getLogger("pifa")

BATCH_TOKENS = 8192  # calibration tokens that go through a layer at once


class Recipe(NamedTuple):
    """How weights are rounded. method: of gptq.METHODS; act_order is for gptq alone."""

    method: str
    bits: int
    group_size: int
    act_order: bool


class Calibration(NamedTuple):
    """windows: (count, length) int64; dataset: the name of the text that they are from."""

    windows: Tensor
    dataset: str

    def as_json(self) -> dict[str, Any]:
        count, length = self.windows.shape
        hashed = files.hash_of(self.windows.tolist())
        return {"dataset": self.dataset, "windows": count, "model_seq_len": length, "windows_sha256": hashed}


@one_line_endings()
def run(options: Namespace) -> dict[str, Any]:
    """Quantize the checkpoint at --model_path into `<its name>-<method><bits>`; returns the result record.

    Raises: UsageError for a model without factors, one that is quantized already, or flags that can't be met;
    RunError where moments are not finite, or scales are beyond float16.
    """
    watch = report.Stopwatch(torch.device(options.DEV))
    packing.check_installed()
    source = find_factors(options)
    recipe = Recipe(options.quantize_method, options.bits, options.group_size, options.act_order)
    calibration = _calibration(options, source) if recipe.method == "gptq" else None
    dtype = options.dtype or source.record["dtype"]
    quantization = {**recipe._asdict(), **(calibration.as_json() if calibration else {})}
    if calibration is None:
        del quantization["act_order"]
    flags_hash = files.hash_of({"source": source.manifest, "dtype": dtype, **quantization})
    name = f"{options.prefix}{source.folder.resolve().name}-{recipe.method}{recipe.bits}"
    folder = Path(options.save_path) / name
    files.check_target(folder, flags_hash, options.resume)
    if folder.exists() and files.is_finished(folder):
        log.warning("%s is finished already", folder)
        return files.read_checkpoint(folder).record
    source.verify()

    with CheckpointWriter(folder, flags_hash, options.resume) as writer:
        model: Any = models.load_model(models.Source(source.folder.name, str(source.folder)), models.DTYPES[dtype])
        entries = {
            name: {**entry, "bits": recipe.bits, "group_size": recipe.group_size}
            for name, entry in source.layers.items()
        }
        quantize_model(model, entries, recipe, calibration, writer, watch.device, options.host_memory)
        config = {**source.config, "dtype": dtype}
        config["quantization_config"] = {**source.config["quantization_config"], "layers": entries}
        writer.describe(config, _files_beside(source))
        counts = files.count_numbers(folder, entries)
        return writer.seal(
            {
                **source.record,
                "mode": "quantize",
                "kind": "quantized",
                "command": options.command,
                "source": str(source.folder),
                "path": str(folder),
                "dtype": dtype,
                "quantization": quantization,
                "bits": recipe.bits,
                "density": counts.density,
                "density_model": counts.density_model,
                "linear_bytes": counts.linear_bytes,
                "linear_mib": round(counts.linear_bytes / 2**20, 3),
                # of every weight of the dense linears, factors, scales, zeros and index included
                "bits_per_weight": round(8 * counts.linear_bytes / counts.dense_linears, 4),
                **watch.readings(),
                "device": report.device_name(watch.device),
                "versions": report.versions(),
            }
        )


def find_factors(options: Namespace) -> Checkpoint:
    """What --model_path names; without it the newest one under --save_path, or what that was quantized from.

    Raises: UsageError where there is none, or it has nothing to quantize.
    """
    if options.model_path == "original":
        raise UsageError("--mode quantize takes factors, which the original model has not: run --mode m first")
    if options.model_path is None:
        source = files.newest_checkpoint(Path(options.save_path), None)
        while source.kind == "quantized":
            source = files.read_checkpoint(source.record["source"])
    else:
        source = files.read_checkpoint(options.model_path)
    if source.kind == "quantized":
        raise UsageError(f"{source.folder} is quantized already: --mode quantize takes {source.record['source']}")
    if is_narrow(source.layers):
        raise UsageError(
            f"{source.folder} has linears with fewer channels (--prune flatllm or auto), and --mode quantize packs none"
        )
    if all(entry["kind"] == "dense" for entry in source.layers.values()):
        raise UsageError(f"{source.folder} has no factors to quantize: all its linears are dense")
    return source


def _calibration(options: Namespace, source: Checkpoint) -> Calibration:
    tokenizer = models.load_tokenizer(models.Source(source.folder.name, str(source.folder)))
    text = data.read_text(options.dataset[0] if options.dataset else None, "train")
    length = options.model_seq_len
    before, _ = data.hold_out(data.tokenize(tokenizer, text.text), options.heldout_nsamples, length)
    return Calibration(data.random_windows(before, options.reconstruct_nsamples, length, options.seed), text.name)


def _files_beside(source: Checkpoint) -> list[Path]:
    """Tokenizer and the like from the source; what loads the folder as it is today."""
    loader = loader_files()
    made = {*source.manifest["shards"], files.MANIFEST, files.RECORD, files.INDEX, "config.json"}
    made |= {path.name for path in loader}
    found = sorted(path for path in source.folder.iterdir() if path.is_file() and path.name not in made)
    return [path for path in found if not path.name.startswith(".")] + loader


@torch.no_grad()
def quantize_model(
    model: PreTrainedModel,
    entries: dict[str, dict[str, Any]],
    recipe: Recipe,
    calibration: Calibration | None,
    writer: CheckpointWriter,
    device: torch.device,
    host_memory: float | None = None,
) -> None:
    """Replace the model's linears, in place, and write every shard that is not there yet.

    entries: `layers` of the quantization config as it will be. Without calibration no data goes through the model.
    """
    held, described = HeldLayers(model), describe_layers(model)
    if calibration:
        windows = calibration.windows
        batch = max(1, BATCH_TOKENS // windows.shape[1])
        limit = None if host_memory is None else int(host_memory * report.GIB)
        shelf = Shelf(limit, writer.folder.parent)
        states, keywords = layer_inputs(model, windows, lambda size: shelf.room(size, device))
    for index, names in enumerate(tqdm(described, desc="quantize", unit="layer")):
        shard = files.layer_shard(index)
        prefix = f"{names.name}."
        here = {name.removeprefix(prefix): entry for name, entry in entries.items() if name.startswith(prefix)}
        with held.filled(names.name, device) as layer, full_precision():
            kwargs = map_tensors(keywords[index], lambda tensor: tensor.to(device)) if calibration else {}
            done = writer.finished(shard)
            if done:
                stored = files.open_shard(writer.folder / shard)
                for name, entry in here.items():
                    layer.set_submodule(name, integration.packed(layer.get_submodule(name), entry))
                layer.load_state_dict({key.removeprefix(prefix): t for key, t in stored.items()})
                if calibration and index + 1 < len(described):
                    advance(layer, states, kwargs, batch)
            elif calibration:
                _quantize_layer(layer, names, here, recipe, states, kwargs, batch)
            else:
                for name in here:
                    _replace(layer, name, recipe, None, f"{prefix}{name}")
        if not done:
            writer.write(shard, {f"{prefix}{key}": t for key, t in layer.state_dict().items()})
    if not writer.finished(files.REST):
        writer.write(files.REST, rest_of(model, described))


def _quantize_layer(
    layer: nn.Module,
    described: DecoderLayer,
    entries: dict[str, dict[str, Any]],
    recipe: Recipe,
    states: Tensor,
    kwargs: dict[str, Any],
    batch: int,
) -> None:
    """Replace the layer's linears, and the hidden states by its outputs once they are replaced."""
    groups = groups_of(described, entries)
    parts = list(states.split(batch))
    with lockstep(layer, {group[0]: None for group in groups}, parts, kwargs) as passes:
        for group in groups:
            gram = None
            for stop in passes.at(group[0]):
                gram = add_product(gram, stop.x, stop.x)
            for name in group:
                _replace(layer, name, recipe, gram, f"{described.name}.{name}")
        for part, output in zip(parts, passes.outputs(), strict=True):
            part.copy_(output)


def groups_of(described: DecoderLayer, entries: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Compressed linears of a layer that share an input, in call order.

    described: of the layer whose nn.Linear are factors; the ones that see another factor's output lead no group.
    """
    groups = []
    for group in described.groups:
        linears = []
        for name in group:
            owner, _, factor = name.rpartition(".")
            if name in entries:
                linears.append(name)
            elif owner in entries and factor == integration.FACTORS[entries[owner]["kind"]][0]:
                linears.append(owner)
        if linears:
            groups.append(linears)
    return groups


def _replace(layer: nn.Module, name: str, recipe: Recipe, gram: Tensor | None, what: str) -> None:
    """Put packed weights in place of a linear, or of both factors of one. gram: X X^T of its inputs; None for rtn."""
    linear = layer.get_submodule(name)
    if isinstance(linear, nn.Linear):
        layer.set_submodule(name, quantized(linear, linear.weight, recipe, gram, what))
        return
    first, second = integration.FACTORS["pifa" if hasattr(linear, "pivot") else "lowrank"]
    inner, outer = getattr(linear, first), getattr(linear, second)
    metric = outer.weight.double().T @ outer.weight.double()  # in which errors of the first factor reach the output
    if first == "pivot":
        metric += torch.eye(len(metric), dtype=metric.dtype, device=metric.device)
    rounded = quantized(inner, inner.weight, recipe, gram, f"{what}.{first}", metric)
    weight = outer.weight
    if gram is not None:
        q = rounded.dequantized(torch.float32).double()
        weight = refit(weight, inner.weight, q, gram, f"{what}.{second}")
        gram = q @ gram @ q.T  # of the outputs of the rounded factor
    setattr(linear, first, rounded)
    setattr(linear, second, quantized(outer, weight, recipe, gram, f"{what}.{second}"))


def quantized(
    linear: nn.Linear, weight: Tensor, recipe: Recipe, gram: Tensor | None, what: str, metric: Tensor | None = None
) -> PackedLinear:
    """The linear with `weight`, (d_out, d_in), rounded for inputs of this Gram matrix, or by itself.

    metric: (d_out, d_out), in which the errors of its outputs count; None where each counts alike.
    """
    rounding: Callable[..., Quantized] = round_to_nearest
    if gram is not None:
        rounding = partial(gptq, hessian=gram, act_order=recipe.act_order)
        if metric is not None:
            rounding = partial(gptq_together, hessian=gram, metric=metric, act_order=recipe.act_order)
    result = rounding(weight, bits=recipe.bits, group_size=recipe.group_size, what=what)
    return packed(result, recipe, linear.bias, linear.weight.dtype)


def packed(result: Quantized, recipe: Recipe, bias: Tensor | None, dtype: torch.dtype) -> PackedLinear:
    codes, zeros = packing.pack_rows(result.codes, recipe.bits), packing.pack_columns(result.zeros, recipe.bits)
    shape = result.codes.shape[0], result.codes.shape[1]
    return PackedLinear.from_packed(codes, result.scales, zeros, shape, recipe.bits, recipe.group_size, bias, dtype)
