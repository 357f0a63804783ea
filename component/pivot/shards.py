"""The tensors of a shard: low-rank factors in, pivots and coefficients out, and what the config then says of them."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from component.checkpoint.entries import Entries
from component.format.integration import FACTORS
from component.format.linear import LowRankLinear, PIFALinear
from component.pivot.fold import AnyLinear, fold, verify
from component.pivot.pivoting import pivot_together
from utils.junctions import Junction, LayerProbe


@torch.no_grad()
def pivot_tensors(
    tensors: dict[str, Tensor],
    entries: Entries,
    *,
    device: torch.device,
    dtype: torch.dtype,
    probe: LayerProbe | None = None,
) -> dict[str, Tensor]:
    """A shard's tensors with every low-rank linear pivoted, and folded where a probe is given.

    entries: of the linears whose tensors these are. Raises: RunError as pivoting and folding do.
    """
    junctions = foldable(probe, entries)
    ends = {name for junction in junctions for name in (*junction.producers, junction.consumer)}
    low_rank, dense = {}, {}
    for name, entry in entries.items():
        if entry["kind"] == "lowrank":
            low_rank[name] = _low_rank(tensors, name, device)
        elif name in ends:
            dense[name] = _dense(tensors, name, device)
    after: dict[str, AnyLinear] = {name: copy.deepcopy(layer) for name, layer in dense.items()}
    together = [[name for name in junction.producers if name in low_rank] for junction in junctions]
    alone = [[name] for name in low_rank if not any(name in group for group in together)]
    for group in filter(None, [*together, *alone]):
        pivoted = pivot_together([(low_rank[name].u.weight, low_rank[name].v.weight) for name in group], group)
        for name, pivots in zip(group, pivoted, strict=True):
            after[name] = PIFALinear.from_pivots(*pivots, low_rank[name].bias, torch.float64)
    for junction in junctions:
        fold(junction, after)
    if probe:
        before: dict[str, AnyLinear] = {**low_rank, **dense}
        for layer in (*before.values(), *after.values()):
            layer.cpu()
        for junction in junctions:
            verify(probe, junction, before=before, after=after)
    rest = {key: t for key, t in tensors.items() if not any(key.startswith(f"{name}.") for name in after)}
    changed = {f"{name}.{key}": t for name, layer in after.items() for key, t in layer.state_dict().items()}
    return {key: (t.to(dtype) if t.is_floating_point() else t).cpu() for key, t in (rest | changed).items()}


def foldable(probe: LayerProbe | None, entries: Entries) -> list[Junction]:
    """Those whose linears are all in the entries, with a low-rank one before the joint: only pivots change an order.

    A linear that calibration never called is not in the entries.
    """
    junctions = probe.junctions if probe else []
    complete = [junction for junction in junctions if entries.keys() >= {*junction.producers, junction.consumer}]
    return [one for one in complete if any(entries[name]["kind"] in FACTORS for name in one.producers)]


def _low_rank(tensors: dict[str, Tensor], name: str, device: torch.device) -> LowRankLinear:
    u, v = (tensors[f"{name}.{factor}.weight"].to(device) for factor in "uv")  # as stored: float64 is more to move
    return LowRankLinear.from_factors(u, v, bias=tensors.get(f"{name}.bias"), dtype=torch.float64)


def _dense(tensors: dict[str, Tensor], name: str, device: torch.device) -> nn.Linear:
    weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device, torch.float64)
    linear.load_state_dict({key: t for key, t in (("weight", weight), ("bias", bias)) if t is not None})
    return linear


def note_entries(entries: Entries, tensors: dict[str, Tensor], junctions: Sequence[Junction]) -> None:
    """Bring the entries in line with the tensors that are stored: kind, rank, and which sides are in pivot order."""
    for name, entry in entries.items():
        if f"{name}.pivot.weight" in tensors:
            entry.update(kind="pifa", rank=len(tensors[f"{name}.pivot.weight"]))
    for junction in junctions:
        if any(entries[name]["kind"] == "pifa" for name in junction.producers):
            in_order = [name for name in junction.producers if _is_identity(tensors.get(f"{name}.perm"))]
            for name, side in [*((name, "outputs") for name in in_order), (junction.consumer, "inputs")]:
                entries[name]["folded"] = sorted({*entries[name].get("folded", ()), side})


def _is_identity(perm: Tensor | None) -> bool:
    return perm is None or torch.equal(perm, torch.arange(len(perm), dtype=perm.dtype))
