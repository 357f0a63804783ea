"""The one driver: walks the decoder layers with a dense and a low-rank data flow, a layer on the device at a time."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from component.allocation import Plan
from component.linear import LowRankLinear
from component.moments import Moments, add_product, full_precision
from component.solvers import Solver
from utils.errors import RunError
from utils.models import DecoderLayer, layer_inputs, map_tensors, run_layer

STATES_SHARE = 0.25  # of the card's free memory


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


def compress_layers(
    model: PreTrainedModel,
    described: list[DecoderLayer],
    plan: Plan,
    solver: Solver,
    flows: Flows,
    device: torch.device,
    dtype: torch.dtype,
    finished: Callable[[int, nn.Module], bool] = lambda index, layer: False,
) -> Iterator[tuple[int, nn.Module]]:
    """Yield (index, layer) for every decoder layer, its linears replaced by low-rank ones at the ranks of `plan`.

    The model stays as it was, on the CPU. Groups are solved in call order, each seeing what the ones before it
    became. `finished(index, layer)` may fill a layer, a copy of the dense one, from an earlier run and return True:
    it is then not solved again, and the flows go through it. dtype: of the new layers' weights.

    Raises: RunError naming the module where a moment or a factor is not finite.
    """
    layers = [model.get_submodule(layer.name) for layer in described]
    needs_flow = solver.needs_dense_gram or solver.needs_low_rank_flow
    dense_states, keywords = layer_inputs(model, flows.windows if needs_flow else flows.windows[:1, :1])
    dense_states = dense_states.to(_home(dense_states, device))
    # the first layer sees the same input in both flows
    low_rank_states = dense_states.clone() if solver.needs_low_rank_flow else None

    for index, (layer, names) in enumerate(zip(tqdm(layers, desc="compress", unit="layer"), described, strict=True)):
        dense = layer.to(device)
        small = copy.deepcopy(dense)
        kwargs = map_tensors(keywords[index], lambda tensor: tensor.to(device))
        with torch.no_grad(), full_precision():
            if not finished(index, small):
                for group in names.groups:
                    ranks = {name: plan[f"{names.name}.{name}"] for name in group}
                    if all(rank is None for rank in ranks.values()):
                        continue
                    later = names.from_group(group)
                    moments = collect(dense, small, later, solver, flows, dense_states, low_rank_states, kwargs)
                    for name, rank in ranks.items():
                        if rank is not None:
                            _replace(small, name, rank, solver, moments, f"{names.name}.{name}", dtype)
            if needs_flow and index + 1 < len(layers):
                _advance(dense, dense_states, kwargs, flows.batch)
                if low_rank_states is not None:
                    _advance(small, low_rank_states, kwargs, flows.batch)
        layer.to("cpu")
        yield index, small


def _home(states: Tensor, device: torch.device) -> torch.device:
    """Where hidden states live: on the card while both flows take less than a quarter of what is free there."""
    if device.type != "cuda":
        return torch.device("cpu")
    free, _ = torch.cuda.mem_get_info(device)
    return device if 2 * states.numel() * states.element_size() < STATES_SHARE * free else torch.device("cpu")


def collect(
    dense: nn.Module,
    small: nn.Module,
    linears: list[str],
    solver: Solver,
    flows: Flows,
    dense_states: Tensor,
    low_rank_states: Tensor | None,
    kwargs: dict[str, Any],
) -> Moments:
    """Accumulate the moments of one group, batch by batch. linears: the group's names in the layer and all later."""
    moments = Moments()
    device = next(dense.parameters()).device

    def inputs(layer: nn.Module, states: Tensor) -> Tensor:
        return input_of(layer, linears, states.to(device), kwargs)

    if solver.needs_dense_gram:
        for batch in dense_states[: flows.whitening].split(flows.batch):
            x_dense = inputs(dense, batch)
            moments.dense_gram = add_product(moments.dense_gram, x_dense, x_dense)
    if low_rank_states is not None:
        pairs = zip(
            dense_states[: flows.reconstruction].split(flows.batch),
            low_rank_states[: flows.reconstruction].split(flows.batch),
            strict=True,
        )
        for dense_batch, low_rank_batch in pairs:
            x_low_rank = inputs(small, low_rank_batch)
            moments.gram = add_product(moments.gram, x_low_rank, x_low_rank)
            if solver.needs_cross:
                moments.cross = add_product(moments.cross, inputs(dense, dense_batch), x_low_rank)
    return moments


def input_of(layer: nn.Module, linears: list[str], hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """The tensor that the first of `linears` receives when the layer runs on `hidden`.

    linears: it and all that are called after it. Their outputs can't reach its input, so zeros take their place:
    most of a layer's arithmetic is in them.
    """
    seen: list[Tensor] = []

    def skipped(module: Any, watched: bool) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            if watched:
                seen.append(x)
            return x.new_zeros(*x.shape[:-1], module.out_features)

        return forward

    modules = [layer.get_submodule(name) for name in linears]
    for module in modules:
        module.forward = skipped(module, module is modules[0])  # type: ignore[method-assign, assignment]
    try:
        run_layer(layer, hidden, kwargs)
    finally:
        for module in modules:
            del module.forward
    return seen[0] if len(seen) == 1 else torch.cat([x.flatten(0, -2) for x in seen])


def _replace(layer: nn.Module, name: str, rank: int, solver: Solver, moments: Moments, what: str, dtype) -> None:
    linear = layer.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    u, v = solver.solve(linear.weight, moments, rank, what)
    if not (torch.isfinite(u).all() and torch.isfinite(v).all()):
        raise RunError(f"{what}: the solver returned factors that are not finite")
    layer.set_submodule(name, LowRankLinear.from_factors(u, v, linear.bias, dtype))


def _advance(layer: nn.Module, states: Tensor, kwargs: dict[str, Any], batch: int) -> None:
    """Replace hidden states by the layer's outputs, batch by batch, in place."""
    device = next(layer.parameters()).device
    for part in states.split(batch):
        part.copy_(run_layer(layer, part.to(device), kwargs))
