"""The one driver: walks the decoder layers with a dense and a low-rank data flow, a layer on the device at a time."""

import copy
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from component.flow.lockstep import Stop, lockstep, pass_threads
from component.flow.refinement import refine_layer
from component.flow.team import Team
from component.format.linear import LowRankLinear
from component.ranks.budget import Channels, Plan
from component.solve.moments import Moments, add_gram, add_magnitude, add_product, full_precision
from component.solve.solvers import Solver
from utils.errors import RunError
from utils.layers import DecoderLayer, HeldLayers, LayerSource, layer_inputs, map_tensors, run_layer
from utils.placement import Shelf

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

    whitening and reconstruction count from the first window on: how many feed the moments of the dense flow alone, and
    how many the two-flow moments. batch: windows that go through a layer at once. waiting: of the batches, those whose
    passes wait in mid-layer, None for all; it changes memory and time only (lockstep.py).
    """

    windows: Tensor
    whitening: int
    reconstruction: int
    batch: int = 1
    waiting: int | None = None

    def needed_by(self, solver: Solver) -> Tensor:
        """The windows that go through the layers; a solver that looks at no data still needs a layer's keywords."""
        if solver.needs_low_rank_flow:
            return self.windows
        return self.windows[: self.whitening] if solver.needs_dense_flow else self.windows[:1, :1]


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
    source: LayerSource | None = None,
    shelf: Shelf | None = None,
    team: Team | None = None,
    narrowing: Callable[..., None] | None = None,
) -> Iterator[tuple[int, nn.Module]]:
    """Yield (index, layer) for every decoder layer, its linears replaced by low-rank ones at the ranks of `plan`.

    The model stays as it was. Groups are solved in call order, each seeing what the ones before it
    became. `finished(index, layer)` may fill a layer, a copy of the dense one, from an earlier run and return True:
    it is then not solved again, and the flows go through it. dtype: of the new layers' weights. refinement: of solved
    layers, where both flows run. source: of the dense layers, where the model itself does not hold them. shelf:
    for the hidden states. team: the processes that share the windows and the solving; all of them yield all layers.
    narrowing: what changes a layer in place of `solve_layer`, with the same arguments (narrowing.py, mixing.py).

    Raises: RunError naming the module where a moment or a factor is not finite.
    """
    source = source or HeldLayers(model)
    shelf, team = shelf or Shelf(), team or Team()
    windows, first = flows.needed_by(solver), 0
    if solver.needs_low_rank_flow or solver.needs_dense_flow:
        first, end = team.share(len(windows))
        windows = windows[first:end]
    tensors = (3 if refinement else 2) if solver.needs_low_rank_flow else 1
    dense_states, keywords = layer_inputs(model, windows, lambda size: shelf.room(tensors * size, device))
    empty = shelf.room(tensors * dense_states.nbytes, device)

    def copied(states: Tensor) -> Tensor:
        return empty(states.shape, states.dtype).copy_(states)

    # the first layer sees the same input in both flows
    low_rank_states = copied(dense_states) if solver.needs_low_rank_flow else None
    before = copied(dense_states) if refinement and low_rank_states is not None else None  # the layer under way

    with pass_threads(-(-len(windows) // flows.batch), flows=2) as threads:
        for index, names in enumerate(tqdm(described, desc="compress", unit="layer", disable=not team.first)):
            kwargs = map_tensors(keywords[index], lambda tensor: tensor.to(device))
            ranks = {name: plan[f"{names.name}.{name}"] for name in names.linears()}
            with source.filled(names.name, device) as dense, torch.no_grad(), full_precision():
                small = copy.deepcopy(dense)
                if not finished(index, small):
                    if before is not None and low_rank_states is not None:
                        before.copy_(low_rank_states)
                    flow_states = dense_states, low_rank_states
                    layer = LayerAtWork(dense, small, names, flow_states, kwargs, dtype, first, threads)
                    (narrowing or solve_layer)(layer, ranks, solver, flows, team)
                    del layer  # the next one needs its room
                    if refinement and before is not None and low_rank_states is not None:
                        states = dense_states, before, low_rank_states
                        _refine(dense, small, refinement, states, kwargs, flows.batch, names.name)
                elif index + 1 < len(described):
                    advance(dense, dense_states, kwargs, flows.batch)
                    if low_rank_states is not None:
                        advance(small, low_rank_states, kwargs, flows.batch)
            yield index, small


class LayerAtWork(NamedTuple):
    """A decoder layer between the two flows. small: the copy of `dense` that changes; dtype: of what is new in it.

    states: hidden states before it in the dense and the low-rank flow, None where the latter is not needed, which
    become those behind it; keywords: of its forward pass. first: number of the window that this process's states begin
    with. threads: for the passes of both flows (lockstep.py).
    """

    dense: nn.Module
    small: nn.Module
    described: DecoderLayer
    states: tuple[Tensor, Tensor | None]
    keywords: dict[str, Any]
    dtype: torch.dtype
    first: int
    threads: Executor


def solve_layer(
    layer: LayerAtWork,
    ranks: Mapping[str, int | None],
    solver: Solver,
    flows: Flows,
    team: Team,
    narrow: Callable[[nn.Module, str, int, Moments], dict[str, nn.Module]] | None = None,
) -> None:
    """Replace the linears of the small layer, and the hidden states of both flows by the layers' outputs.

    narrow: what takes a linear of which `ranks` says channels, given the moments of its input; it may put a stand-in
    for the passes that wait before it, and returns what belongs into the layer once they are through, by name.
    """
    dense, small, described, states, kwargs, dtype, first, threads = layer
    finished: dict[str, nn.Module] = {}
    groups = [group for group in described.groups if any(ranks[name] is not None for name in group)]
    stops = {group[0]: described.residuals.get(group[0]) if solver.needs_drift else None for group in groups}
    batches = [[] if flow is None else list(flow.split(flows.batch)) for flow in states]
    with (
        lockstep(dense, stops, batches[0], kwargs, flows.waiting, threads) as dense_flow,
        lockstep(small, stops, batches[1], kwargs, flows.waiting, threads) as flow,
    ):
        for group in groups:
            moments = Moments()
            weights = solver.token_weights(f"{described.name}.{group[0]}") if solver.token_weights else None
            low_rank = flow.at(group[0]) if batches[1] else itertools.repeat(None, len(batches[0]))
            _gather(moments, dense_flow.at(group[0]), low_rank, solver, flows, weights, first)
            device = next(small.parameters()).device
            team.add_up(moments, device)
            found = {}
            mine = [name for number, name in enumerate(group) if number % team.size == team.rank]
            for name in mine:
                rank = ranks[name]
                if narrow and isinstance(rank, Channels):
                    finished |= narrow(small, name, rank, moments)
                elif rank is not None:
                    found[name] = _solved(small, name, rank, solver, moments, f"{described.name}.{name}")
            for number, name in enumerate(group):
                if ranks[name] is not None and not isinstance(ranks[name], Channels):
                    _replace(small, name, team.factors(found.get(name), number % team.size, device), dtype)
        # what has gone through a stand-in is not what the finished layer gives, to the last bit
        for passes, parts in zip((dense_flow, flow), batches[:1] if finished else batches, strict=False):
            for part, output in zip(parts, passes.outputs(), strict=True):
                part.copy_(output)
    for name, module in finished.items():
        small.set_submodule(name, module)
    if finished and states[1] is not None:
        advance(small, states[1], kwargs, flows.batch)


def _refine(
    dense: nn.Module,
    small: nn.Module,
    refinement: Refinement,
    states: tuple[Tensor, Tensor, Tensor],
    kwargs: dict[str, Any],
    batch: int,
    name: str,
) -> None:
    """states: the dense flow behind the layer, the low-rank flow before it, and behind it, which is then made anew."""
    behind, before, after = states
    targets = after  # nobody looks at what it holds any more
    targets.copy_(before)
    advance(dense, targets, kwargs, batch)
    targets.lerp_(behind, refinement.drift_ratio)
    losses = refine_layer(small, before, targets, kwargs, refinement.steps, batch, seed=refinement.seed, name=name)
    log.info("%s refined: relative error %.4g -> %.4g", name, *losses)
    after.copy_(before)
    advance(small, after, kwargs, batch)


def _gather(
    moments: Moments,
    dense: Iterable[Stop],
    low_rank: Iterable[Stop | None],
    solver: Solver,
    flows: Flows,
    weights: Tensor | None,
    start: int,
) -> None:
    """Add all batches where their passes wait. Of what they hold nothing is left here: solving needs the room."""
    for dense_stop, stop in zip(dense, low_rank, strict=True):
        add_moments(moments, dense_stop, stop, solver, flows, weights, start)
        start += dense_stop.windows


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

    if solver.needs_dense_flow and start < flows.whitening:
        x = rows(dense.x, flows.whitening)
        if solver.needs_dense_gram:
            moments.dense_gram = add_gram(moments.dense_gram, x)
        if solver.needs_dense_magnitude:
            moments.dense_magnitude = add_magnitude(moments.dense_magnitude, x)
    if low_rank is None or start >= flows.reconstruction:
        return
    x_low_rank = weighted = rows(low_rank.x, flows.reconstruction)
    if weights is not None:
        part = weights[start : start + len(x_low_rank)]
        weighted = x_low_rank * part[..., None].to(x_low_rank.device, x_low_rank.dtype)
    moments.gram = add_gram(moments.gram, x_low_rank, None if weights is None else weighted)
    if solver.needs_cross:
        moments.cross = add_product(moments.cross, rows(dense.x, flows.reconstruction), weighted)
    if dense.stream is not None and low_rank.stream is not None:
        drift = rows(dense.stream - low_rank.stream, flows.reconstruction)
        moments.drift = add_product(moments.drift, drift, weighted)


def _solved(
    layer: nn.Module, name: str, rank: int, solver: Solver, moments: Moments, what: str
) -> tuple[Tensor, Tensor]:
    linear = layer.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    u, v = solver.solve(linear.weight, moments, rank, what)
    if not (torch.isfinite(u).all() and torch.isfinite(v).all()):
        raise RunError(f"{what}: the solver returned factors that are not finite")
    return u, v


def _replace(layer: nn.Module, name: str, factors: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    linear = layer.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    layer.set_submodule(name, LowRankLinear.from_factors(*factors, linear.bias, dtype))


def advance(layer: nn.Module, states: Tensor, kwargs: dict[str, Any], batch: int) -> None:
    """Replace hidden states by the layer's outputs, batch by batch, in place."""
    device = next(layer.parameters()).device
    for part in states.split(batch):
        part.copy_(run_layer(layer, part.to(device), kwargs))
