"""--prune flatllm in a decoder layer: which linears it makes narrower, by how much, from which data, and as what."""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from component.channels.flatllm import (
    absorb_bases,
    compensated,
    head_axes,
    leverage_scores,
    most_telling,
    project_values,
    value_moment,
)
from component.channels.parts import Parts
from component.checkpoint.entries import layer_entries, stored_shape
from component.flow.lockstep import Stop
from component.flow.means import Flows, Means
from component.flow.solving import LayerAtWork, add_moments
from component.format.narrow import PaddedHeads, PickedHeads
from component.ranks.allocation import balanced
from component.ranks.budget import Budget, Module
from component.ranks.cost import LOW_RANK
from component.ranks.sizes import DENSE, Channels, Plan, Size
from component.solve.moments import Moments
from component.solve.reconstruction import target_moment
from component.solve.solver import Solver
from utils.errors import RunError, UsageError
from utils.layers import DecoderLayer

LEVERAGE_RIDGE = 1.0  # lambda of the paper, absolute, on raw sums


def narrow_plan(
    modules: Sequence[Module],
    described: Sequence[DecoderLayer],
    parts: Sequence[Parts],
    *,
    density: float,
    influence: Sequence[float],
) -> Plan:
    """Channels that are left: of each head for values and output, of the MLP for the other three.

    The narrowed linears of a layer keep a share in proportion to its influence, capped at all (IPRS); other linears
    stay dense, and the shares make up for them. What rounding frees in the heads goes to the MLP.

    influence: by layer; all the same for a uniform plan. Raises: UsageError where no such widths fit the density.
    """
    narrowed = {f"{layer.name}.{n}" for layer, p in zip(described, parts, strict=True) for n in p.attention + p.mlp}
    these = [module for module in modules if module.name in narrowed]
    total, free = sum(m.numbers for m in modules), sum(m.numbers for m in these)
    left = density - (total - free) / total
    if left <= 0:
        raise UsageError(
            f"density {density:g} is below the {1 - free / total:.3f} of the linears that --prune flatllm leaves dense"
        )
    shares = balanced(Budget(these, left * total / free, LOW_RANK, influence=influence), lambda m: influence[m.layer])
    numbers = {module.name: module.numbers for module in modules}
    plan: Plan = dict.fromkeys((module.name for module in modules), DENSE)
    for layer, part in zip(described, parts, strict=True):
        attention, mlp = ([f"{layer.name}.{name}" for name in names] for names in (part.attention, part.mlp))
        share = shares[attention[0]]
        per_width = sum(numbers[name] for name in attention) // part.head_dim
        per_channel = sum(numbers[name] for name in mlp) // part.channels
        width = max(1, int(share * part.head_dim))
        budget = share * (per_width * part.head_dim + per_channel * part.channels)
        kept = min(int((budget - width * per_width) / per_channel), part.channels)
        if kept < 1:
            raise UsageError(f"density {density:g} leaves the MLP of {layer.name} no channel: raise it")
        plan.update(dict.fromkeys(attention, Channels(width) if width < part.head_dim else DENSE))
        plan.update(dict.fromkeys(mlp, Channels(kept) if kept < part.channels else DENSE))
    return plan


@dataclass(frozen=True)
class Narrowing:
    """How layers are narrowed; an instance is a LayerSolver.

    parts: by full name of the layer; mix_ratio: lambda of the MLP's target, between the dense flow and what the
    original projection makes of the narrow one; damping: of the compensation.
    """

    parts: Mapping[str, Parts]
    _: KW_ONLY
    mix_ratio: float
    damping: float

    def __call__(
        self, layer: LayerAtWork, plan: Mapping[str, Size], *, solver: Solver, flows: Flows, means: Means
    ) -> None:
        """See `LayerSolver`. The MLP sees what the narrow attention writes."""
        part = self.parts[layer.described.name]
        width, channels = plan[part.value], plan[part.down]
        stops = {name: None for name in (part.value, part.down) if isinstance(plan[name], Channels)}
        finished: dict[str, nn.Module] = {}
        with layer.passes(stops, means) as (dense_flow, flow):
            if isinstance(width, Channels):
                moment, start = None, layer.first
                for _, stop in zip(dense_flow.at(part.value), flow.at(part.value), strict=True):
                    moment = _add_values(moment, layer.small, part, stop=stop, limit=flows.reconstruction - start)
                    start += stop.windows
                self._narrow_heads(layer, part, moment, width=width.left)
            if isinstance(channels, Channels):
                moments, start = Moments(), layer.first
                for dense_stop, stop in zip(dense_flow.at(part.down), flow.at(part.down), strict=True):
                    add_moments(moments, dense_stop, stop, solver=solver, flows=flows, weights=None, start=start)
                    start += dense_stop.windows
                finished = self._narrow_mlp(layer, part, moments, left=channels.left)
            for passes, batches in zip((dense_flow, flow), layer.batches(means.batch), strict=True):
                for states, output in zip(batches, passes.outputs(), strict=True):
                    states.copy_(output)
        for name, module in finished.items():
            layer.small.set_submodule(name, module)

    def _narrow_heads(self, layer: LayerAtWork, part: Parts, moment: Tensor | None, *, width: int) -> None:
        assert moment is not None
        bases, _ = head_axes(finite(moment, f"{layer.described.name}.{part.value}"), width)
        output: Any = layer.small.get_submodule(part.output)
        weight = absorb_bases(output.weight, bases)
        narrow = narrow_heads(layer.small, part, bases=bases, output_weight=weight, dtype=layer.dtype)
        for name, module in narrow.items():
            layer.small.set_submodule(name, module)

    def _narrow_mlp(self, layer: LayerAtWork, part: Parts, moments: Moments, *, left: int) -> dict[str, nn.Module]:
        what = f"{layer.described.name}.{part.down}"
        gram, down = moments.of("gram"), layer.small.get_submodule(part.down)
        assert isinstance(down, nn.Linear)
        chosen = most_telling(leverage_scores(finite(gram, what), LEVERAGE_RIDGE), left)
        target = target_moment(down.weight, gram, moments.cross, mix_ratio=self.mix_ratio)
        weight = compensated(down.weight, target, gram, kept=chosen, damping=self.damping, what=what)
        return narrow_mlp(layer.small, part, chosen=chosen, down_weight=weight, dtype=layer.dtype)


class _Picking(nn.Module):
    """A narrow linear that is given all channels."""

    def __init__(self, linear: nn.Linear, chosen: Tensor):
        super().__init__()
        self.linear, self.chosen = linear, chosen

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x[..., self.chosen])


def _add_values(moment: Tensor | None, layer: nn.Module, part: Parts, *, stop: Stop, limit: int) -> Tensor | None:
    """Add the values of the first `limit` windows where a pass waits before them."""
    if limit <= 0:
        return moment
    linear = layer.get_submodule(part.value)
    assert isinstance(linear, nn.Linear)
    x = stop.x.reshape(stop.windows, -1, stop.x.shape[-1])[:limit]
    more = value_moment(F.linear(x, linear.weight, linear.bias), part.heads)
    return more if moment is None else moment.add_(more)


def narrow_heads(
    layer: nn.Module, part: Parts, *, bases: Tensor, output_weight: Tensor, dtype: torch.dtype
) -> dict[str, nn.Module]:
    """What takes the place of the two linears, by name. output_weight: (d_out, query heads * width), float64."""
    value, output = layer.get_submodule(part.value), layer.get_submodule(part.output)
    assert isinstance(value, nn.Linear) and isinstance(output, nn.Linear)
    new_value, new_output = _empty_heads(value, output, part=part, width=bases.shape[-1], dtype=dtype)
    _fill(new_value, *project_values(value.weight, value.bias, bases))
    _fill(new_output, output_weight, output.bias)
    return {part.value: new_value, part.output: new_output}


def narrow_mlp(
    layer: nn.Module, part: Parts, *, chosen: Tensor, down_weight: Tensor, dtype: torch.dtype
) -> dict[str, nn.Module]:
    """What takes the place of the three linears, by name; passes that wait before `down` go through a stand-in.

    chosen: channels that stay, in rising order; down_weight: (d_out, as many), float64.
    """
    down = layer.get_submodule(part.down)
    assert isinstance(down, nn.Linear)
    narrow = _linear(down_weight, down.bias, dtype)
    finished: dict[str, nn.Module] = {part.down: narrow}
    for name in (part.gate, part.up):
        linear = layer.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        rows = linear.weight[chosen], None if linear.bias is None else linear.bias[chosen]
        finished[name] = _linear(*rows, dtype)
    layer.set_submodule(part.down, _Picking(narrow, chosen))
    return finished


def _empty_heads(
    value: nn.Linear, output: nn.Linear, *, part: Parts, width: int, dtype: torch.dtype
) -> tuple[PaddedHeads, PickedHeads]:
    device = value.weight.device
    sizes = [(one.in_features, one.out_features) for one in (value, output)]
    return (
        PaddedHeads(*sizes[0], part.heads, width, value.bias is not None, device, dtype),
        PickedHeads(*sizes[1], part.query_heads, width, output.bias is not None, device, dtype),
    )


def _linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, weight.device, dtype)
    _fill(linear, weight, bias)
    return linear


@torch.no_grad()
def _fill(module: nn.Linear | PaddedHeads | PickedHeads, weight: Tensor, bias: Tensor | None) -> None:
    module.weight.copy_(weight)
    if bias is not None and module.bias is not None:
        module.bias.copy_(bias)
    module.requires_grad_(False)


def finite(moment: Tensor, what: str) -> Tensor:
    """Raises: RunError where it is not, in words; eigh would say something else."""
    if not torch.isfinite(moment).all():
        raise RunError(f"{what}: the moments of its input are not finite")
    return moment


def narrow_entries(
    modules: Sequence[Module], described: Sequence[DecoderLayer], parts: Sequence[Parts], *, plan: Plan
) -> dict[str, dict[str, Any]]:
    """The `layers` of the quantization config (see integration.py); features are those of the dense model."""
    entries = layer_entries(modules, plan)
    for module in modules:
        layer, part = described[module.layer], parts[module.layer]
        role, size, entry = module.name.removeprefix(f"{layer.name}."), plan[module.name], entries[module.name]
        if not isinstance(size, Channels):
            continue
        if role == part.value:
            entry |= {"kind": "narrow_out", "heads": part.heads, "width": size.left}
        elif role == part.output:
            entry |= {"kind": "narrow_in", "heads": part.query_heads, "width": size.left}
        else:
            entry["kept_in" if role == part.down else "kept_out"] = size.left
        entry["rank"] = min(stored_shape(entry))
    return entries
