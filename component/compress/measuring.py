"""The profile pass: one forward and one backward walk over the model, a layer on the device at a time.

It measures what allocation and truncation want to know of each module: the expected KL at every rank, the second
moment of its output gradients, and how much each token matters to it. The hidden states between layers are kept, on
the card where they fit; of a layer's activations only moments and a sample.
"""

import contextlib
import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from component.channels.by_output import channel_curve, head_curve
from component.channels.parts import Parts
from component.solve.moments import add_gram
from component.solve.sensitivity import angular_influence, loss_curve, outlier_share, output_moment, output_weighting
from utils.errors import RunError
from utils.layers import (
    CPU,
    DecoderLayer,
    HeldLayers,
    LayerSource,
    layer_inputs,
    logits_from,
    map_tensors,
    rest_on,
    run_layer,
    watching,
)
from utils.placement import Empty, Shelf
from utils.precision import full_precision

CURVE_TOKENS = 16384  # evenly spaced tokens on which the loss curves are evaluated; all of 131,072 gave the same ranks


@dataclass(frozen=True)
class Profiling:
    """How a profile is made. windows: (count, length) int64; seed: of the labels drawn.

    shrinkages: of the output weightings that truncation may use, None for none; each has loss curves of its own.
    batch: windows that go through a layer at once. layers: decoder layers that take the place of the model's own, of
    which only the weights are then looked at; their linears may be of any kind. thinning: moments and curves are of
    every so-many-th token. parts: of each layer, where losses of narrower blocks are wanted too.
    """

    windows: Tensor
    device: torch.device
    _: KW_ONLY
    seed: int
    shrinkages: tuple[float | None, ...] = (None,)
    batch: int = 1
    layers: Sequence[nn.Module] | None = None
    thinning: int = 1
    parts: Sequence[Parts] | None = None


class Sensitivity(NamedTuple):
    """loss_curves: (shrinkages, k + 1) float64, expected KL per token at each rank; output_gram: (d_out, d_out)."""

    loss_curves: Tensor
    output_gram: Tensor


class LayerProfile(NamedTuple):
    """Of one decoder layer: its linears by full name; by the first of each group, how much every token matters to it,
    (windows, length) float32 with mean 1; the share of outlier weights; the influence of the block; by the projection
    behind attention and behind the MLP, the expected KL per token at each number of channels that are left before it,
    (shrinkages, n + 1) float64, where that is wanted."""

    linears: dict[str, Sensitivity]
    token_scores: dict[str, Tensor]
    outliers: float
    influence: float
    channel_curves: dict[str, Tensor]


def profile_layers(
    model: PreTrainedModel,
    described: list[DecoderLayer],
    profiling: Profiling,
    *,
    source: LayerSource | None = None,
    shelf: Shelf | None = None,
) -> Iterator[tuple[int, LayerProfile]]:
    """Yield (index, profile) for every decoder layer, the last one first.

    Float32 throughout: gradients in half precision vanish. source: of the layers, where the model does not hold them.
    shelf: for the hidden states between all layers.
    """
    source = source or HeldLayers(model)
    windows, device, batch = profiling.windows, profiling.device, profiling.batch
    hidden, keywords = layer_inputs(model, windows)
    empty = (shelf or Shelf()).room((len(described) + 3) * hidden.numel() * torch.float32.itemsize, device)
    states = [empty(hidden.shape, torch.float32).copy_(hidden)]
    with torch.no_grad(), full_precision():
        for index, names in enumerate(tqdm(described, desc="profile", unit="layer")):
            given = contextlib.nullcontext(profiling.layers[index]) if profiling.layers else None
            with given or source.filled(names.name, CPU) as layer:
                wide, kwargs = _wide(layer, keywords[index], device)
            states.append(empty(hidden.shape, torch.float32))
            for part, after in zip(states[-2].split(batch), states[-1].split(batch), strict=True):
                after.copy_(run_layer(wide, part.to(device), kwargs))
            if not torch.isfinite(states[-1]).all():
                raise RunError(f"{_culprit(wide, names.name)} is not finite")
    influence = [angular_influence(*pair) for pair in itertools.pairwise(states)]
    gradient = _output_gradients(model, states.pop(), profiling, empty=empty)
    for index in tqdm(reversed(range(len(described))), total=len(described), desc="sensitivities", unit="layer"):
        names = described[index]
        with source.filled(names.name, CPU) as original:
            weights = _weights(original, names.linears(), device)
            layer = profiling.layers[index] if profiling.layers else original
            wide, kwargs = _wide(layer, keywords[index], device)
        with full_precision():
            seen = _Seen(names, profiling)
            gradient = _backward(wide, seen, states.pop(), gradient=gradient, kwargs=kwargs)
            linears = dict(_sensitivities(weights, seen, profiling.shrinkages))
            parts = profiling.parts[index] if profiling.parts else None
            narrow = dict(_narrow_curves(parts, weights, seen, shrinkages=profiling.shrinkages)) if parts else {}
        norms = {first: gram.diagonal().sqrt() for first, gram in seen.input_grams.items()}
        shared = [(weights[name], norms[group[0]]) for group in names.groups for name in group]
        outliers = outlier_share([weight for weight, _ in shared], [norm for _, norm in shared])
        scores = {f"{names.name}.{group[0]}": seen.token_scores(group, windows) for group in names.groups}
        yield (
            index,
            LayerProfile(
                linears=linears,
                token_scores=scores,
                outliers=outliers,
                influence=influence[index],
                channel_curves=narrow,
            ),
        )


class _Seen:
    """What is kept of a layer's activations and gradients: moments, and an evenly spaced sample of tokens."""

    def __init__(self, described: DecoderLayer, profiling: Profiling):
        self.described = described
        self.profiling = profiling
        self.thinning = profiling.thinning
        self.stride = -(-profiling.windows.numel() // (CURVE_TOKENS * self.thinning))
        self.input_grams: dict[str, Tensor] = {}  # by the first linear of a group
        self.output_grams: dict[str, Tensor] = {}
        self.norms: dict[str, list[Tensor]] = {}  # squared, of every token's gradient
        self._samples: dict[str, list[Tensor]] = {}

    def add(self, inputs: dict[str, Tensor], gradients: dict[str, Tensor]) -> None:
        """One batch: inputs (..., d_in) by the first linear of a group, output gradients (..., d_out) by linear."""
        for name, g in gradients.items():
            self.norms.setdefault(name, []).append(g.flatten(0, -2).square().sum(-1))
        inputs, gradients = (
            {name: rows.flatten(0, -2)[:: self.thinning] for name, rows in part.items()} for part in (inputs, gradients)
        )
        for name, x in inputs.items():
            self.input_grams[name] = add_gram(self.input_grams.get(name), x)
            self._keep(f"{name}.input", x)
        for name, g in gradients.items():
            self.output_grams[name] = add_gram(self.output_grams.get(name), g)
            self._keep(name, g)

    def sample(self, name: str) -> tuple[Tensor, Tensor]:
        """Inputs and output gradients of the same tokens: (tokens, d_in), (tokens, d_out)."""
        first = next(group[0] for group in self.described.groups if name in group)
        return torch.cat(self._samples[f"{first}.input"]), torch.cat(self._samples[name])

    def token_scores(self, group: tuple[str, ...], windows: Tensor) -> Tensor:
        """Squared gradient norm of every token over its mean, averaged over the linears of the group."""
        norms = torch.stack([torch.cat(self.norms[name]) for name in group])
        means = norms.mean(1, keepdim=True)
        scores = torch.where(means > 0, norms / means, torch.ones_like(norms)).mean(0)
        return scores.cpu().reshape(windows.shape)

    def _keep(self, key: str, rows: Tensor) -> None:
        # a copy: a view would keep all tokens in memory
        self._samples.setdefault(key, []).append(rows[:: self.stride].clone())


def _wide(layer: nn.Module, kwargs: dict[str, Any], device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
    """Float32 copies on the device."""

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, torch.float32) if tensor.is_floating_point() else tensor.to(device)

    return copy.deepcopy(layer).to(device, torch.float32), map_tensors(kwargs, move)


def _culprit(layer: nn.Module, name: str) -> str:
    """What to blame for outputs that are not finite: a parameter that is not, or else the layer's output."""
    broken = (key for key, tensor in layer.named_parameters() if not torch.isfinite(tensor).all())
    return next((f"{name}.{key}" for key in broken), f"the output of {name}")


def _weights(layer, names: list[str], device: torch.device) -> dict[str, Tensor]:
    return {name: layer.get_submodule(name).weight.detach().to(device) for name in names}


def _output_gradients(model, states: Tensor, profiling: Profiling, *, empty: Empty) -> Tensor:
    """Gradient of the log-likelihood of labels drawn from the model, with respect to the last layer's output."""
    windows, device = profiling.windows, profiling.device
    draw = torch.Generator(device=device).manual_seed(profiling.seed)
    gradients = empty(states.shape, states.dtype)
    with rest_on(model, device), full_precision():
        for window, hidden, gradient in zip(windows, states, gradients, strict=True):
            hidden = hidden[None].to(device).requires_grad_(True)
            scores = logits_from(model, window[None].to(device), hidden)[0].float().log_softmax(-1)
            labels = torch.multinomial(scores.detach().exp(), 1, generator=draw)
            gradient.copy_(torch.autograd.grad(scores.gather(-1, labels).sum(), hidden)[0][0])
    return gradients


def _backward(layer: nn.Module, seen: _Seen, states: Tensor, *, gradient: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Batch by batch forward and backward through the layer, into `seen`; the gradient of the layer's own input.

    The gradient of the output is overwritten by it.
    """
    names = seen.described.linears()
    firsts = {group[0] for group in seen.described.groups}
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def see(name: str, x: Tensor, y: Tensor) -> None:
        outputs[name] = y
        if name in firsts:
            inputs[name] = x.detach()

    with watching(layer, names, see):
        for part, incoming in zip(
            states.split(seen.profiling.batch), gradient.split(seen.profiling.batch), strict=True
        ):
            hidden = part.to(seen.profiling.device).requires_grad_(True)
            output = run_layer(layer, hidden, kwargs)
            wanted = [hidden, *(outputs[name] for name in names)]
            found = torch.autograd.grad(output, wanted, incoming.to(seen.profiling.device))
            seen.add(inputs, dict(zip(names, found[1:], strict=True)))
            incoming.copy_(found[0])  # now that nobody needs it: gradients of outputs may be views of it
    return gradient


def _sensitivities(weights: dict[str, Tensor], seen: _Seen, shrinkages: tuple[float | None, ...]):
    for group in seen.described.groups:
        for name in group:
            full_name = f"{seen.described.name}.{name}"
            inputs, gradients = seen.sample(name)
            output_gram = seen.output_grams[name]
            curves = []
            for shrinkage in shrinkages:
                moment = output_moment(output_gram, 1.0 if shrinkage is None else shrinkage)
                gram = seen.input_grams[group[0]]
                curves.append(
                    loss_curve(weights[name], gram, inputs=inputs, gradients=gradients, moment=moment, what=full_name)
                )
            yield full_name, Sensitivity(torch.stack(curves).cpu(), output_gram.float().cpu())


def _narrow_curves(part: Parts, weights: dict[str, Tensor], seen: _Seen, *, shrinkages: tuple[float | None, ...]):
    for name in (part.output, part.down):
        full_name = f"{seen.described.name}.{name}"
        first = next(group[0] for group in seen.described.groups if name in group)
        inputs, gradients = seen.sample(name)
        tokens = sum(map(len, seen.norms[name])) // seen.thinning
        curves = []
        for shrinkage in shrinkages:
            weighting = None if shrinkage is None else output_weighting(seen.output_grams[name], shrinkage, full_name)
            what = weights[name], seen.input_grams[first]
            sample: dict[str, Any] = {
                "inputs": inputs,
                "gradients": gradients,
                "weighting": weighting,
                "what": full_name,
            }
            if name == part.down:
                curves.append(channel_curve(*what, tokens=tokens, **sample))
            else:
                curves.append(head_curve(*what, query_heads=part.query_heads, heads=part.heads, **sample))
        yield full_name, torch.stack(curves).cpu()
