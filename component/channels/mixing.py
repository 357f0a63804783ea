"""--prune auto in a decoder layer: low-rank factors and narrower blocks side by side, from the same moments."""

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from component.channels.by_output import channel_order, head_blocks, head_metric, narrow_output, reading_axes, weighted
from component.channels.flatllm import compensated
from component.channels.narrowing import finite, narrow_heads, narrow_mlp
from component.channels.parts import Parts
from component.flow.means import Flows, Means
from component.flow.solving import LayerAtWork, solve_layer
from component.ranks.sizes import DENSE, Channels, Size
from component.solve.moments import Moments
from component.solve.solver import Solver


@dataclass(frozen=True)
class Mixing:
    """How layers are made; an instance is a LayerSolver.

    A block of which the plan says channels stays dense until the passes reach the projection behind it. This is then
    fitted to what is left of its input, to the target that factors would be fitted to.

    parts: by full name of the layer; damping: of the fit; weighting: name -> L_g, or None.
    """

    parts: Mapping[str, Parts]
    _: KW_ONLY
    damping: float
    weighting: Callable[[str], Tensor] | None

    def __call__(
        self, layer: LayerAtWork, plan: Mapping[str, Size], *, solver: Solver, flows: Flows, means: Means
    ) -> None:
        """See `LayerSolver`; plan: rank or channels of each linear of the layer."""
        part = self.parts[layer.described.name]
        behind = part.output, part.down
        now = {
            name: DENSE if isinstance(size, Channels) and name not in behind else size for name, size in plan.items()
        }

        narrow = partial(self._narrow, layer, part, solver=solver)
        solve_layer(layer, now, solver=solver, flows=flows, means=means, narrow=narrow)

    def _narrow(
        self, layer: LayerAtWork, part: Parts, name: str, *, left: int, moments: Moments, solver: Solver
    ) -> dict[str, nn.Module]:
        what = f"{layer.described.name}.{name}"
        linear = layer.small.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        gram, weight = finite(moments.of("gram"), what), linear.weight.double()
        target = solver.target(weight, moments)
        seen = weighted(weight, None if self.weighting is None else self.weighting(what).to(weight.device))
        fit: dict[str, Any] = {"damping": self.damping, "what": what}
        if name == part.down:
            chosen = channel_order(seen, gram, **fit)[:left].sort().values
            fitted = compensated(weight, target, gram, kept=chosen, **fit)
            return narrow_mlp(layer.small, part, chosen=chosen, down_weight=fitted, dtype=layer.dtype)
        heads = {"query_heads": part.query_heads, "heads": part.heads}
        bases = reading_axes(head_blocks(gram, **heads), head_metric(seen, **heads), left, what=what)
        fitted = narrow_output(weight, target, gram, bases=bases, **fit)
        finished = narrow_heads(layer.small, part, bases=bases, output_weight=fitted, dtype=layer.dtype)
        layer.small.set_submodule(name, _InBases(finished[name], bases))
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
