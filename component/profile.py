"""The profile pass: one forward and one backward walk over the dense model, a layer on the device at a time.

It measures what allocation and truncation want to know of each module: the expected KL at every rank, and the second
moment of its output gradients. Only the hidden states between layers are kept, in host memory.
"""

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from component.moments import add_product, full_precision
from component.sensitivity import angular_influence, loss_curve, outlier_share, output_weighting
from utils import checkpoint as files
from utils.layers import DecoderLayer, layer_inputs, logits_from, map_tensors, rest_on, run_layer, watching


@dataclass(frozen=True)
class Profiling:
    """How a profile is made. windows: (count, length) int64, one at a time through a layer; seed: of the labels drawn.

    shrinkages: of the output weightings that truncation may use, None for none; each has loss curves of its own.
    """

    windows: Tensor
    device: torch.device
    seed: int
    shrinkages: tuple[float | None, ...] = (None,)


class Sensitivity(NamedTuple):
    """loss_curves: (shrinkages, k + 1) float64, expected KL per token at each rank; output_gram: (d_out, d_out)."""

    loss_curves: Tensor
    output_gram: Tensor


class LayerProfile(NamedTuple):
    """Of one decoder layer: its linears by full name; the share of outlier weights; the influence of the block."""

    linears: dict[str, Sensitivity]
    outliers: float
    influence: float


class Profile:
    """A finished profile on disk; what is small is read at once, output moments layer by layer when asked for."""

    def __init__(self, folder: Path, names: list[str], shrinkages: tuple[float | None, ...]):
        self.folder = folder
        self.shrinkages = shrinkages
        self.shard_of: dict[str, str] = {}
        self.loss_curves: dict[str, Tensor] = {}
        self.outliers: list[float] = []
        self.influence: list[float] = []
        for shard in sorted(path.name for path in folder.glob("layer-*.safetensors")):
            tensors = files.open_shard(folder / shard)
            outliers, influence = tensors["layer"].tolist()
            self.outliers.append(outliers)
            self.influence.append(influence)
            for name in (name for name in names if f"{name}.loss_curves" in tensors):
                self.shard_of[name] = shard
                self.loss_curves[name] = tensors[f"{name}.loss_curves"]

    def curves(self, shrinkage: float | None) -> dict[str, list[float]]:
        """By module, the expected loss at every rank where truncation weighs output errors with this shrinkage."""
        row = self.shrinkages.index(shrinkage)
        return {name: curves[row].tolist() for name, curves in self.loss_curves.items()}

    def output_gram(self, name: str) -> Tensor:
        return files.open_tensor(self.folder / self.shard_of[name], f"{name}.output_gram")


def make_profile(
    folder: Path, identity: str, model: PreTrainedModel, described: list[DecoderLayer], profiling: Profiling
) -> Profile:
    """Profile the model into `folder`, or take what an earlier run with the same identity finished there.

    Raises: UsageError where the folder holds the profile of another model, data, seed or weighting.
    """
    names = [f"{layer.name}.{name}" for layer in described for name in layer.linears()]
    weighted = any(shrinkage is not None for shrinkage in profiling.shrinkages)
    resume = folder.exists()
    writer = files.CheckpointWriter(folder, identity, resume)
    if not files.is_finished(folder):
        for index, measured in profile_layers(model, described, profiling):
            tensors = {"layer": torch.tensor([measured.outliers, measured.influence], dtype=torch.float64)}
            for name, sensitivity in measured.linears.items():
                tensors[f"{name}.loss_curves"] = sensitivity.loss_curves
                if weighted:  # large, and of use to the weighting alone
                    tensors[f"{name}.output_gram"] = sensitivity.output_gram
            writer.write(files.layer_shard(index), tensors)
        writer.seal({"kind": "profile", "windows": list(profiling.windows.shape)})
    return Profile(folder, names, profiling.shrinkages)


def profile_layers(
    model: PreTrainedModel, described: list[DecoderLayer], profiling: Profiling
) -> Iterator[tuple[int, LayerProfile]]:
    """Yield (index, profile) for every decoder layer, the last one first.

    Float32 throughout: gradients in half precision vanish.
    """
    windows, device = profiling.windows, profiling.device
    layers = [model.get_submodule(layer.name) for layer in described]
    hidden, keywords = layer_inputs(model, windows)
    states = [hidden.float()]
    with torch.no_grad(), full_precision():
        for layer, kwargs in zip(tqdm(layers, desc="profile", unit="layer"), keywords, strict=True):
            wide, kwargs = _wide(layer, kwargs, device)
            outputs = [run_layer(wide, window[None].to(device), kwargs).cpu() for window in states[-1]]
            states.append(torch.cat(outputs))
    influence = [angular_influence(*pair) for pair in itertools.pairwise(states)]
    gradient = _output_gradients(model, states.pop(), profiling)
    for index in tqdm(reversed(range(len(layers))), total=len(layers), desc="sensitivities", unit="layer"):
        wide, kwargs = _wide(layers[index], keywords[index], device)
        with full_precision():
            inputs, gradients, gradient = _backward(wide, described[index], states.pop(), gradient, kwargs, device)
            linears = dict(_sensitivities(wide, described[index], inputs, gradients, profiling.shrinkages))
        outliers = _outliers(wide, described[index], inputs)
        yield index, LayerProfile(linears, outliers, influence[index])


def _outliers(layer, described: DecoderLayer, inputs: dict[str, Tensor]) -> float:
    firsts = {name: group[0] for group in described.groups for name in group}
    weights = [layer.get_submodule(name).weight.detach() for name in firsts]
    return outlier_share(weights, [inputs[first].double().norm(dim=0) for first in firsts.values()])


def _wide(layer: nn.Module, kwargs: dict[str, Any], device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
    """Float32 copies on the device."""

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, torch.float32) if tensor.is_floating_point() else tensor.to(device)

    return copy.deepcopy(layer).to(device, torch.float32), map_tensors(kwargs, move)


def _output_gradients(model, states: Tensor, profiling: Profiling) -> Tensor:
    """Gradient of the log-likelihood of labels drawn from the model, with respect to the last layer's output."""
    windows, device = profiling.windows, profiling.device
    draw = torch.Generator(device=device).manual_seed(profiling.seed)
    gradients = []
    with rest_on(model, device), full_precision():
        for window, hidden in zip(windows, states, strict=True):
            hidden = hidden[None].to(device).requires_grad_(True)
            scores = logits_from(model, window[None].to(device), hidden)[0].float().log_softmax(-1)
            labels = torch.multinomial(scores.detach().exp(), 1, generator=draw)
            gradients.append(torch.autograd.grad(scores.gather(-1, labels).sum(), hidden)[0].cpu())
    return torch.cat(gradients)


def _backward(
    layer: nn.Module, described: DecoderLayer, states: Tensor, gradient: Tensor, kwargs: dict[str, Any], device
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Inputs by each group's first linear, output gradients by linear, both (tokens, width), and the layer's own."""
    inputs: dict[str, list[Tensor]] = {group[0]: [] for group in described.groups}
    gradients: dict[str, list[Tensor]] = {name: [] for name in described.linears()}
    outputs: dict[str, Tensor] = {}
    earlier = []

    def see(name: str, x: Tensor, y: Tensor) -> None:
        outputs[name] = y
        if name in inputs:
            inputs[name].append(x.detach().flatten(0, -2))

    with watching(layer, gradients, see):
        for hidden, incoming in zip(states, gradient, strict=True):
            hidden = hidden[None].to(device).requires_grad_(True)
            output = run_layer(layer, hidden, kwargs)
            wanted = [hidden, *(outputs[name] for name in gradients)]
            found = torch.autograd.grad(output, wanted, incoming[None].to(device))
            earlier.append(found[0].cpu())
            for name, values in zip(gradients, found[1:], strict=True):
                gradients[name].append(values.flatten(0, -2))
    join = torch.cat
    return {n: join(x) for n, x in inputs.items()}, {n: join(g) for n, g in gradients.items()}, join(earlier)


def _sensitivities(layer, described: DecoderLayer, inputs, gradients, shrinkages: tuple[float | None, ...]):
    for group in described.groups:
        x = inputs[group[0]]
        gram = add_product(None, x, x)
        for name in group:
            full_name = f"{described.name}.{name}"
            weight = layer.get_submodule(name).weight.detach()
            output_gram = add_product(None, gradients[name], gradients[name])
            curves = []
            for shrinkage in shrinkages:
                weighting = None if shrinkage is None else output_weighting(output_gram, shrinkage, full_name)
                curves.append(loss_curve(weight, gram, x, gradients[name], weighting, full_name))
            yield full_name, Sensitivity(torch.stack(curves).cpu(), output_gram.float().cpu())
