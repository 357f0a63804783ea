"""A decoder layer between the two flows: what may change it, and how its groups of linears are solved in call order."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from component.flow.lockstep import Lockstep, Stop, lockstep
from component.flow.means import Flows, Means
from component.format.linear import LowRankLinear
from component.ranks.sizes import DENSE, Channels, Rank, Size
from component.solve.moments import Moments, add_gram, add_magnitude, add_product
from component.solve.solver import Solver
from utils.errors import RunError
from utils.layers import DecoderLayer, advance


@dataclass(frozen=True, kw_only=True)
class LayerAtWork:
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

    @property
    def device(self) -> torch.device:
        return next(self.small.parameters()).device

    def batches(self, size: int) -> tuple[list[Tensor], list[Tensor]]:
        """The hidden states of the dense and of the low-rank flow, so many windows each; none of a flow that is not."""
        dense, low_rank = self.states
        return list(dense.split(size)), [] if low_rank is None else list(low_rank.split(size))

    @contextmanager
    def passes(self, stops: Mapping[str, str | None], means: Means) -> Iterator[tuple[Lockstep, Lockstep]]:
        """Passes of all batches through the dense and the small layer: see `lockstep`."""
        how: dict[str, Any] = {"keywords": self.keywords, "waiting": means.waiting, "threads": self.threads}
        dense, low_rank = self.batches(means.batch)
        with lockstep(self.dense, stops, dense, **how) as first, lockstep(self.small, stops, low_rank, **how) as second:
            yield first, second


class LayerSolver(Protocol):
    """What changes a layer. `solve_layer` is one; others are in the room `channels`."""

    def __call__(
        self, layer: LayerAtWork, plan: Mapping[str, Size], *, solver: Solver, flows: Flows, means: Means
    ) -> None:
        """Change the small layer, and replace the hidden states of both flows by the layers' outputs.

        plan: of each linear of the layer, by its name in it.
        """


class Narrow(Protocol):
    """What takes a linear that gets fewer channels in the midst of `solve_layer`."""

    def __call__(self, name: str, *, left: int, moments: Moments) -> dict[str, nn.Module]:
        """Returns what belongs into the layer once the passes are through, by name in it.

        left: channels that the linear is to read. moments: of its input. It may put a stand-in before the passes that
        wait.
        """


def solve_layer(
    layer: LayerAtWork,
    plan: Mapping[str, Size],
    *,
    solver: Solver,
    flows: Flows,
    means: Means,
    narrow: Narrow | None = None,
) -> None:
    """See `LayerSolver`: factors in place of the linears that have a rank, group after group.

    narrow: what takes a linear of which the plan says channels.
    """
    team, small, described = means.team, layer.small, layer.described
    finished: dict[str, nn.Module] = {}
    groups = [group for group in described.groups if any(plan[name] is not DENSE for name in group)]
    stops = {group[0]: described.residuals.get(group[0]) if solver.needs_drift else None for group in groups}
    batches = layer.batches(means.batch)
    with layer.passes(stops, means) as (dense_flow, flow):
        for group in groups:
            low_rank = flow.at(group[0]) if batches[1] else itertools.repeat(None, len(batches[0]))
            dense = dense_flow.at(group[0])
            moments = _gathered(layer, group[0], dense=dense, low_rank=low_rank, solver=solver, flows=flows)
            team.add_up(moments, layer.device)
            solved = {}
            mine = [name for number, name in enumerate(group) if number % team.size == team.rank]
            for name in mine:
                match plan[name]:
                    case Rank(rank):
                        solved[name] = _solved(layer, name, rank, solver=solver, moments=moments)
                    case Channels(left):
                        assert narrow is not None
                        finished |= narrow(name, left=left, moments=moments)
            for number, name in enumerate(group):
                if isinstance(plan[name], Rank):
                    _replace(layer, name, team.factors(solved.get(name), number % team.size, layer.device))
            del moments, solved  # the next group needs their room
        # what has gone through a stand-in is not what the finished layer gives, to the last bit
        for passes, parts in zip((dense_flow, flow), batches[:1] if finished else batches, strict=False):
            for part, output in zip(parts, passes.outputs(), strict=True):
                part.copy_(output)
    for name, module in finished.items():
        small.set_submodule(name, module)
    if finished and layer.states[1] is not None:
        advance(small, layer.states[1], layer.keywords, batch=means.batch)


def _gathered(
    layer: LayerAtWork,
    first: str,
    *,
    dense: Iterable[Stop],
    low_rank: Iterable[Stop | None],
    solver: Solver,
    flows: Flows,
) -> Moments:
    """Of the group whose first linear this is, summed where the passes wait before it.

    Of what they hold nothing is left here: solving needs the room.
    """
    moments, start = Moments(), layer.first
    weights = solver.token_weights(f"{layer.described.name}.{first}") if solver.token_weights else None
    for dense_stop, stop in zip(dense, low_rank, strict=True):
        add_moments(moments, dense_stop, stop, solver=solver, flows=flows, weights=weights, start=start)
        start += dense_stop.windows
    return moments


def add_moments(
    moments: Moments,
    dense: Stop,
    low_rank: Stop | None,
    *,
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


def _solved(layer: LayerAtWork, name: str, rank: int, *, solver: Solver, moments: Moments) -> tuple[Tensor, Tensor]:
    full_name, linear = f"{layer.described.name}.{name}", layer.small.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    u, v = solver.solve(linear.weight, moments, rank, what=full_name)
    if not (torch.isfinite(u).all() and torch.isfinite(v).all()):
        raise RunError(f"{full_name}: the solver returned factors that are not finite")
    return u, v


def _replace(layer: LayerAtWork, name: str, factors: tuple[Tensor, Tensor]) -> None:
    linear = layer.small.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    layer.small.set_submodule(name, LowRankLinear.from_factors(*factors, linear.bias, layer.dtype))
