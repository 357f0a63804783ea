"""The one driver: walks the decoder layers with a dense and a low-rank data flow, a layer on the device at a time."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from component.budget import Plan
from component.linear import LowRankLinear
from component.moments import Moments, add_product, full_precision
from component.solvers import Solver
from utils.errors import RunError
from utils.layers import DecoderLayer, layer_inputs, map_tensors, run_layer, watching

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
) -> Iterator[tuple[int, nn.Module]]:
    """Yield (index, layer) for every decoder layer, its linears replaced by low-rank ones at the ranks of `plan`.

    The model stays as it was, on the CPU. Groups are solved in call order, each seeing what the ones before it
    became. `finished(index, layer)` may fill a layer, a copy of the dense one, from an earlier run and return True:
    it is then not solved again, and the flows go through it. dtype: of the new layers' weights.

    Raises: RunError naming the module where a moment or a factor is not finite.
    """
    layers = [model.get_submodule(layer.name) for layer in described]
    dense_states, keywords = layer_inputs(model, flows.needed_by(solver))
    dense_states = dense_states.to(_home(dense_states, device))
    # the first layer sees the same input in both flows
    low_rank_states = dense_states.clone() if solver.needs_low_rank_flow else None

    for index, (layer, names) in enumerate(zip(tqdm(layers, desc="compress", unit="layer"), described, strict=True)):
        dense = layer.to(device)
        small = copy.deepcopy(dense)
        kwargs = map_tensors(keywords[index], lambda tensor: tensor.to(device))
        with torch.no_grad(), full_precision():
            done = finished(index, small)
            alone = low_rank_states is None  # the dense flow then goes on while it is measured
            grams = {}
            if solver.needs_dense_gram and (alone or not done):
                grams = dense_grams(dense, names, flows, dense_states, kwargs, goes_on=alone)
            if not done:
                for group in names.groups:
                    ranks = {name: plan[f"{names.name}.{name}"] for name in group}
                    if all(rank is None for rank in ranks.values()):
                        continue
                    moments = Moments(dense_gram=grams.get(group))
                    if low_rank_states is not None:
                        flow_states = (dense_states, low_rank_states)
                        collect(moments, dense, small, names, group, solver, flows, flow_states, kwargs)
                    for name, rank in ranks.items():
                        if rank is not None:
                            _replace(small, name, rank, solver, moments, f"{names.name}.{name}", dtype)
            if low_rank_states is not None and index + 1 < len(layers):
                advance(dense, dense_states, kwargs, flows.batch)
                advance(small, low_rank_states, kwargs, flows.batch)
        layer.to("cpu")
        yield index, small


def _home(states: Tensor, device: torch.device) -> torch.device:
    """Where hidden states live: on the card while both flows take less than a quarter of what is free there."""
    if device.type != "cuda":
        return torch.device("cpu")
    free, _ = torch.cuda.mem_get_info(device)
    return device if 2 * states.numel() * states.element_size() < STATES_SHARE * free else torch.device("cpu")


def dense_grams(
    layer: nn.Module, described: DecoderLayer, flows: Flows, states: Tensor, kwargs: dict[str, Any], goes_on: bool
) -> dict[tuple[str, ...], Tensor]:
    """The dense flow's Gram matrix of every group, in one pass: nothing in this flow waits for a solve.

    goes_on: also replace the hidden states by the layer's outputs.
    """
    grams: dict[tuple[str, ...], Tensor] = {}
    device = next(layer.parameters()).device
    group_of = {group[0]: group for group in described.groups}

    def see(first: str, x: Tensor, _y: Tensor) -> None:
        grams[group_of[first]] = add_product(grams.get(group_of[first]), x, x)

    with watching(layer, group_of, see):
        for batch in states[: flows.whitening].split(flows.batch):
            output = run_layer(layer, batch.to(device), kwargs)
            if goes_on:
                batch.copy_(output)
    return grams


def collect(
    moments: Moments,
    dense: nn.Module,
    small: nn.Module,
    described: DecoderLayer,
    group: tuple[str, ...],
    solver: Solver,
    flows: Flows,
    states: tuple[Tensor, Tensor],
    kwargs: dict[str, Any],
) -> None:
    """Accumulate the two-flow moments of one group, batch by batch. states: of the dense and the low-rank flow."""
    device = next(dense.parameters()).device
    later = described.from_group(group)
    stream = described.residuals.get(group[0]) if solver.needs_drift else None

    def inputs(layer: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor | None]:
        return watched_input(layer, later, stream, batch.to(device), kwargs)

    batches = [flow[: flows.reconstruction].split(flows.batch) for flow in states]
    for dense_batch, low_rank_batch in zip(*batches, strict=True):
        x_low_rank, h_low_rank = inputs(small, low_rank_batch)
        moments.gram = add_product(moments.gram, x_low_rank, x_low_rank)
        if solver.needs_cross or stream is not None:
            x_dense, h_dense = inputs(dense, dense_batch)
            if solver.needs_cross:
                moments.cross = add_product(moments.cross, x_dense, x_low_rank)
            if h_dense is not None and h_low_rank is not None:
                moments.drift = add_product(moments.drift, h_dense - h_low_rank, x_low_rank)


def watched_input(
    layer: nn.Module, linears: list[str], stream: str | None, hidden: Tensor, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """The tensor that the first of `linears` receives when the layer runs on `hidden`, and the residual stream.

    linears: it and all that are called after it. Their outputs can't reach its input, so zeros take their place:
    most of a layer's arithmetic is in them. stream: the submodule whose input is the stream, "" for the layer's own
    input, None where the stream is not wanted.
    """
    seen: list[Tensor] = []
    streams: list[Tensor] = [hidden] if stream == "" else []

    def skipped(module: nn.Linear, watched: bool) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            if watched:
                seen.append(x)
            return x.new_zeros(*x.shape[:-1], module.out_features)

        return forward

    modules = [layer.get_submodule(name) for name in linears]
    for module in modules:
        module.forward = skipped(module, module is modules[0])  # type: ignore[method-assign, assignment, arg-type]
    handle = None
    if stream:
        handle = layer.get_submodule(stream).register_forward_pre_hook(lambda _module, args: streams.append(args[0]))
    try:
        run_layer(layer, hidden, kwargs)
    finally:
        for module in modules:
            del module.forward
        if handle is not None:
            handle.remove()
    x = seen[0] if len(seen) == 1 else torch.cat([x.flatten(0, -2) for x in seen])
    return x, (streams[0] if streams else None)


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
