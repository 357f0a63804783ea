"""The one driver: walks the decoder layers with a dense and a low-rank data flow, a layer on the device at a time."""

import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from component.flow.lockstep import pass_threads
from component.flow.means import Flows, Means
from component.flow.refinement import Descent, refine_layer
from component.flow.solving import LayerAtWork, LayerSolver, solve_layer
from component.ranks.sizes import Plan
from component.solve.solver import Solver
from utils.layers import DecoderLayer, advance, layer_inputs, map_tensors
from utils.precision import full_precision

log = logging.getLogger("pifa")


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """Tuning of each solved layer by gradient, towards drift_ratio of the dense flow's output.

    The rest, 1 - drift_ratio, is what the original layer makes of the low-rank flow. steps: of the optimiser, per
    layer; seed: of its draws of windows.
    """

    steps: int
    drift_ratio: float
    seed: int


@dataclass(frozen=True)
class Compression:
    """What becomes of the layers. plan: of every linear, by full name; dtype: of the new layers' weights.

    layer_solver: what changes a layer in place of `solve_layer`. refinement: of solved layers, where both flows run.
    """

    plan: Plan
    solver: Solver
    _: KW_ONLY
    dtype: torch.dtype
    layer_solver: LayerSolver | None = None
    refinement: Refinement | None = None


def compress_layers(
    model: PreTrainedModel,
    described: list[DecoderLayer],
    compression: Compression,
    *,
    flows: Flows,
    means: Means,
    finished: Callable[[int, nn.Module], bool] = lambda index, layer: False,
) -> Iterator[tuple[int, nn.Module]]:
    """Yield (index, layer) for every decoder layer, its linears replaced as `compression` says.

    The model stays as it was. Groups are solved in call order, each seeing what the ones before it
    became. `finished(index, layer)` may fill a layer, a copy of the dense one, from an earlier run and return True:
    it is then not solved again, and the flows go through it. All processes of a team yield all layers.

    Raises: RunError naming the module where a moment or a factor is not finite.
    """
    solver, refinement, team, device = compression.solver, compression.refinement, means.team, means.device
    change: LayerSolver = compression.layer_solver or solve_layer
    windows, first = flows.needed_by(solver), 0
    if solver.needs_low_rank_flow or solver.needs_dense_flow:
        first, end = team.share(len(windows))
        windows = windows[first:end]
    tensors = (3 if refinement else 2) if solver.needs_low_rank_flow else 1
    dense_states, keywords = layer_inputs(model, windows, lambda size: means.shelf.room(tensors * size, device))
    empty = means.shelf.room(tensors * dense_states.nbytes, device)

    def copied(states: Tensor) -> Tensor:
        return empty(states.shape, states.dtype).copy_(states)

    # the first layer sees the same input in both flows
    low_rank_states = copied(dense_states) if solver.needs_low_rank_flow else None
    before = copied(dense_states) if refinement and low_rank_states is not None else None  # the layer under way

    with pass_threads(-(-len(windows) // means.batch), flows=2) as threads:
        for index, layer in enumerate(tqdm(described, desc="compress", unit="layer", disable=not team.first)):
            kwargs = map_tensors(keywords[index], lambda tensor: tensor.to(device))
            plan = {name: compression.plan[f"{layer.name}.{name}"] for name in layer.linears()}
            with means.source.filled(layer.name, device) as dense, torch.no_grad(), full_precision():
                small = copy.deepcopy(dense)
                if not finished(index, small):
                    if before is not None and low_rank_states is not None:
                        before.copy_(low_rank_states)
                    at_work = LayerAtWork(
                        dense=dense,
                        small=small,
                        described=layer,
                        states=(dense_states, low_rank_states),
                        keywords=kwargs,
                        dtype=compression.dtype,
                        first=first,
                        threads=threads,
                    )
                    change(at_work, plan, solver=solver, flows=flows, means=means)
                    if refinement and before is not None:
                        _refine(at_work, refinement, before, batch=means.batch)
                    del at_work  # the next one needs its room
                elif index + 1 < len(described):
                    advance(dense, dense_states, kwargs, batch=means.batch)
                    if low_rank_states is not None:
                        advance(small, low_rank_states, kwargs, batch=means.batch)
            yield index, small


def _refine(layer: LayerAtWork, refinement: Refinement, before: Tensor, *, batch: int) -> None:
    """Tune the solved layer, whose states are those behind it in both flows; the low-rank ones are then made anew.

    before: the low-rank flow before the layer.
    """
    behind, after = layer.states
    assert after is not None
    targets = after  # its values are not needed again
    targets.copy_(before)
    advance(layer.dense, targets, layer.keywords, batch=batch)
    targets.lerp_(behind, refinement.drift_ratio)
    descent = Descent(steps=refinement.steps, batch=batch, seed=refinement.seed)
    name = layer.described.name
    losses = refine_layer(layer.small, before, targets, keywords=layer.keywords, descent=descent, name=name)
    log.info("%s refined: relative error %.4g -> %.4g", name, *losses)
    after.copy_(before)
    advance(layer.small, after, layer.keywords, batch=batch)
