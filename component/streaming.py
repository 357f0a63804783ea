"""The one driver: walks the decoder layers with a dense and a low-rank data flow, a layer on the device at a time."""

import copy
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from component.budget import Plan
from component.linear import LowRankLinear
from component.lockstep import Stop, lockstep
from component.moments import Moments, add_product, full_precision
from component.refinement import refine_layer
from component.solvers import Solver
from utils.errors import RunError
from utils.layers import DecoderLayer, layer_inputs, map_tensors, run_layer
from utils.placement import home

log = logging.getLogger("pifa")


@dataclass(frozen=True)
class Refinement:
    """Tuning of each solved layer by gradient, towards drift_ratio of the dense flow's output.

    The rest, 1 - drift_ratio, is what the original layer makes of the low-rank flow. steps: of the optimiser, per
    layer; seed: of its draws of windows.
    """

    steps: int
    drift_ratio: float
    seed: int


@dataclass(frozen=True)
class Flows:
    """How the calibration windows are used. windows: (count, length) int64.

    whitening and reconstruction count from the first window on: how many feed the dense flow's Gram matrix, and how
    many the two-flow moments. batch: windows that go through a layer at once.
    """

    windows: Tensor
    whitening: int
    reconstruction: int
    batch: int = 1

    def needed_by(self, solver: Solver) -> Tensor:
        """The windows that go through the layers; a solver that looks at no data still needs a layer's keywords."""
        if solver.needs_low_rank_flow:
            return self.windows
        return self.windows[: self.whitening] if solver.needs_dense_gram else self.windows[:1, :1]


def compress_layers(
    model: PreTrainedModel,
    described: list[DecoderLayer],
    plan: Plan,
    solver: Solver,
    flows: Flows,
    device: torch.device,
    dtype: torch.dtype,
    finished: Callable[[int, nn.Module], bool] = lambda index, layer: False,
    refinement: Refinement | None = None,
) -> Iterator[tuple[int, nn.Module]]:
    """Yield (index, layer) for every decoder layer, its linears replaced by low-rank ones at the ranks of `plan`.

    The model stays as it was, on the CPU. Groups are solved in call order, each seeing what the ones before it
    became. `finished(index, layer)` may fill a layer, a copy of the dense one, from an earlier run and return True:
    it is then not solved again, and the flows go through it. dtype: of the new layers' weights. refinement: of solved
    layers, where both flows run.

    Raises: RunError naming the module where a moment or a factor is not finite.
    """
    layers = [model.get_submodule(layer.name) for layer in described]
    dense_states, keywords = layer_inputs(model, flows.needed_by(solver))
    dense_states = dense_states.to(home(2 * dense_states.nbytes, device))
    # the first layer sees the same input in both flows
    low_rank_states = dense_states.clone() if solver.needs_low_rank_flow else None

    for index, (layer, names) in enumerate(zip(tqdm(layers, desc="compress", unit="layer"), described, strict=True)):
        dense = layer.to(device)
        small = copy.deepcopy(dense)
        kwargs = map_tensors(keywords[index], lambda tensor: tensor.to(device))
        ranks = {name: plan[f"{names.name}.{name}"] for name in names.linears()}
        with torch.no_grad(), full_precision():
            if not finished(index, small):
                before = None if refinement is None or low_rank_states is None else low_rank_states.clone()
                _solve_layer(dense, small, names, ranks, solver, flows, (dense_states, low_rank_states), kwargs, dtype)
                if refinement and low_rank_states is not None and before is not None:
                    low_rank_states.copy_(before)
                    _refine(dense, small, refinement, (dense_states, low_rank_states), kwargs, flows.batch, names.name)
            elif index + 1 < len(layers):
                advance(dense, dense_states, kwargs, flows.batch)
                if low_rank_states is not None:
                    advance(small, low_rank_states, kwargs, flows.batch)
        layer.to("cpu")
        yield index, small


def _solve_layer(
    dense: nn.Module,
    small: nn.Module,
    described: DecoderLayer,
    ranks: Mapping[str, int | None],
    solver: Solver,
    flows: Flows,
    states: tuple[Tensor, Tensor | None],
    kwargs: dict[str, Any],
    dtype: torch.dtype,
) -> None:
    """Replace the linears of `small`, a copy of `dense`, and the hidden states of both flows by the layers' outputs."""
    groups = [group for group in described.groups if any(ranks[name] is not None for name in group)]
    stops = {group[0]: described.residuals.get(group[0]) if solver.needs_drift else None for group in groups}
    batches = [[] if flow is None else list(flow.split(flows.batch)) for flow in states]
    with lockstep(dense, stops, batches[0], kwargs) as dense_flow, lockstep(small, stops, batches[1], kwargs) as flow:
        for group in groups:
            moments = Moments()
            weights = solver.token_weights(f"{described.name}.{group[0]}") if solver.token_weights else None
            low_rank = flow.at(group[0]) if batches[1] else itertools.repeat(None)
            start = 0
            for dense_stop, stop in zip(dense_flow.at(group[0]), low_rank, strict=False):
                add_moments(moments, dense_stop, stop, solver, flows, weights, start)
                start += dense_stop.windows
            for name in group:
                rank = ranks[name]
                if rank is not None:
                    _replace(small, name, rank, solver, moments, f"{described.name}.{name}", dtype)
        for passes, parts in zip((dense_flow, flow), batches, strict=True):
            for part, output in zip(parts, passes.outputs(), strict=True):
                part.copy_(output)


def _refine(
    dense: nn.Module,
    small: nn.Module,
    refinement: Refinement,
    states: tuple[Tensor, Tensor],
    kwargs: dict[str, Any],
    batch: int,
    name: str,
) -> None:
    """states: the dense flow behind the layer, the low-rank flow before it; the latter is then led through it."""
    behind, low_rank = states
    targets = low_rank.clone()
    advance(dense, targets, kwargs, batch)
    targets.lerp_(behind, refinement.drift_ratio)
    losses = refine_layer(small, low_rank, targets, kwargs, refinement.steps, batch, seed=refinement.seed, name=name)
    log.info("%s refined: relative error %.4g -> %.4g", name, *losses)
    advance(small, low_rank, kwargs, batch)


def add_moments(
    moments: Moments,
    dense: Stop,
    low_rank: Stop | None,
    solver: Solver,
    flows: Flows,
    weights: Tensor | None,
    start: int,
) -> None:
    """Add one batch, whose first window is number `start`, to the moments of the linear where its passes wait.

    weights: of the tokens in the two-flow moments, (windows, length), or None.
    """

    def rows(x: Tensor, limit: int) -> Tensor:
        """The windows that count, (windows, length, d): some families flatten windows and length for a while."""
        return x.reshape(dense.windows, -1, x.shape[-1])[: max(limit - start, 0)]

    if solver.needs_dense_gram and start < flows.whitening:
        x = rows(dense.x, flows.whitening)
        moments.dense_gram = add_product(moments.dense_gram, x, x)
    if low_rank is None or start >= flows.reconstruction:
        return
    x_low_rank = weighted = rows(low_rank.x, flows.reconstruction)
    if weights is not None:
        part = weights[start : start + len(x_low_rank)]
        weighted = x_low_rank * part[..., None].to(x_low_rank.device, x_low_rank.dtype)
    moments.gram = add_product(moments.gram, x_low_rank, weighted)
    if solver.needs_cross:
        moments.cross = add_product(moments.cross, rows(dense.x, flows.reconstruction), weighted)
    if dense.stream is not None and low_rank.stream is not None:
        drift = rows(dense.stream - low_rank.stream, flows.reconstruction)
        moments.drift = add_product(moments.drift, drift, weighted)


def _replace(layer: nn.Module, name: str, rank: int, solver: Solver, moments: Moments, what: str, dtype) -> None:
    linear = layer.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    u, v = solver.solve(linear.weight, moments, rank, what)
    if not (torch.isfinite(u).all() and torch.isfinite(v).all()):
        raise RunError(f"{what}: the solver returned factors that are not finite")
    layer.set_submodule(name, LowRankLinear.from_factors(u, v, linear.bias, dtype))


def advance(layer: nn.Module, states: Tensor, kwargs: dict[str, Any], batch: int) -> None:
    """Replace hidden states by the layer's outputs, batch by batch, in place."""
    device = next(layer.parameters()).device
    for part in states.split(batch):
        part.copy_(run_layer(layer, part.to(device), kwargs))
