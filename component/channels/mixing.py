"""--prune auto in a decoder layer: low-rank factors and narrower blocks side by side, from the same moments."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from component.channels.by_output import channel_order, head_bases, head_blocks, head_metric, narrow_output, weighted
from component.channels.flatllm import compensated
from component.channels.narrowing import finite, narrow_heads, narrow_mlp
from component.channels.parts import Parts
from component.flow.streaming import Flows, LayerAtWork, solve_layer
from component.flow.team import Team
from component.ranks.budget import Channels
from component.solve.moments import Moments
from component.solve.solvers import Solver


@dataclass(frozen=True)
class Mixing:
    """How layers are made; an instance takes the place of the solving of groups in `compress_layers`.

    A block of which the plan says channels stays dense until the passes reach the projection behind it. This is then
    fitted to what is left of its input, to the target that factors would be fitted to.

    parts: by full name of the layer; damping: of the fit; weighting: name -> L_g, or None.
    """

    parts: Mapping[str, Parts]
    damping: float
    weighting: Callable[[str], Tensor] | None

    def __call__(
        self,
        layer: LayerAtWork,
        plan: Mapping[str, int | None],
        solver: Solver,
        flows: Flows,
        team: Team,
    ) -> None:
        """See `solve_layer`; plan: rank or channels of each linear of the layer."""
        name = layer.described.name
        part = self.parts[name]
        behind = part.output, part.down
        ranks = {name: None if isinstance(n, Channels) and name not in behind else n for name, n in plan.items()}
        narrow = partial(self._narrow, name, part, solver, layer.dtype)
        solve_layer(layer, ranks, solver, flows, team, narrow)

    def _narrow(
        self, layer_name: str, part: Parts, solver: Solver, dtype: torch.dtype,
        layer: nn.Module, name: str, count: int, moments: Moments,
    ) -> dict[str, nn.Module]:  # fmt: skip
        what = f"{layer_name}.{name}"
        linear = layer.get_submodule(name)
        assert isinstance(linear, nn.Linear) and moments.gram is not None and solver.target is not None
        gram, weight = finite(moments.gram, what), linear.weight.double()
        target = solver.target(weight, moments)
        seen = weighted(weight, None if self.weighting is None else self.weighting(what).to(weight.device))
        if name == part.down:
            chosen = channel_order(seen, gram, self.damping, what)[:count].sort().values
            fitted = compensated(weight, target, gram, chosen, self.damping, what)
            return narrow_mlp(layer, part, chosen, fitted, dtype)
        heads = part.query_heads, part.heads
        bases = head_bases(head_blocks(gram, *heads), head_metric(seen, *heads), count, what)
        fitted = narrow_output(weight, target, gram, bases, self.damping, what)
        finished = narrow_heads(layer, part, bases, fitted, dtype)
        layer.set_submodule(name, _InBases(finished[name], bases))
        return finished


class _InBases(nn.Module):
    """A narrow output projection that is given full heads."""

    def __init__(self, output: Any, bases: Tensor):
        super().__init__()
        self.output, self.bases = output, bases

    def forward(self, x: Tensor) -> Tensor:
        heads, head_dim, _ = self.bases.shape
        by_head = x.unflatten(-1, (heads, -1, head_dim))  # (..., heads, query heads of one, head_dim)
        narrow = torch.einsum("...hqd,hdw->...hqw", by_head, self.bases.to(x.dtype))
        return F.linear(narrow.flatten(-3), self.output.weight, self.output.bias)
