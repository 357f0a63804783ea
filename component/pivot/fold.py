"""Folding: a linear that comes next takes its input in pivot order, so that nothing has to be put back in order.

A pivoted linear computes [y_p, y_np] and then reorders it. Where its output meets the next linear channel by channel
(down's input in LLaMA is silu(gate) * up), the order can stay as it comes: y[order] B[:, order]^T = y B^T. The linears
that come together choose their pivots together (pivoting.py), and `perm` becomes the identity. The function is the
same, exactly.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from component.format.linear import LowRankLinear, PIFALinear
from utils.errors import RunError
from utils.junctions import Junction, LayerProbe

AnyLinear = nn.Linear | LowRankLinear | PIFALinear

TOLERANCE = 1e-7  # relative, in float64: pivoting drops directions below 1e-10


def fold(junction: Junction, layers: Mapping[str, AnyLinear]) -> None:
    """Put the channels at a junction into pivot order, in place.

    The order is that of the pivoted producer with the highest rank. Every producer follows: rows of a dense or
    low-rank one, `perm` of a pivoted one, which is the identity where the pivots were chosen together. The consumer
    follows with its input columns, whatever its kind; those of a pivoted one do not touch its pivots.

    layers: linears by the junction's names. Without a pivoted producer there is nothing to fold.
    """
    pivoted = [layer for name in junction.producers if isinstance(layer := layers[name], PIFALinear)]
    if not pivoted:
        return
    order = max(pivoted, key=lambda layer: layer.rank).perm.argsort()
    for name in junction.producers:
        permute_outputs(layers[name], order)
    permute_inputs(layers[junction.consumer], order)


@torch.no_grad()
def permute_outputs(layer: AnyLinear, order: Tensor) -> None:
    """Output j becomes what output order[j] was."""
    if isinstance(layer, PIFALinear):
        layer.perm.copy_(layer.perm[order])
    else:
        rows = (layer.u if isinstance(layer, LowRankLinear) else layer).weight
        rows.copy_(rows[order])
    if layer.bias is not None:
        layer.bias.copy_(layer.bias[order])


@torch.no_grad()
def permute_inputs(layer: AnyLinear, order: Tensor) -> None:
    """Input j is taken to be what input order[j] was."""
    first = layer.pivot if isinstance(layer, PIFALinear) else layer.v if isinstance(layer, LowRankLinear) else layer
    first.weight.copy_(first.weight[:, order])


def verify(
    probe: LayerProbe, junction: Junction, *, before: Mapping[str, AnyLinear], after: Mapping[str, AnyLinear]
) -> None:
    """Run the layer in float64 with the linears of the junction as they were and as they are.

    Raises: RunError where the consumer's outputs differ by more than pivoting's rounding.
    """
    names = [*junction.producers, junction.consumer]
    old, new = (probe.output_of(junction.consumer, {n: layers[n] for n in names}) for layers in (before, after))
    error = ((new - old).norm() / old.norm().clamp(min=torch.finfo(old.dtype).tiny)).item()
    if not error <= TOLERANCE:
        raise RunError(f"folding into {junction.consumer} changed its output by {error:.1e}; run without --fold")
