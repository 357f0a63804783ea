"""The driver of --mode quantize: walks the layers with the float and the integer model's data flow.

True sequential: layer after layer, and in a layer one group of linears with the same input after the other, each with
the inputs that the model has with everything before it quantized. As in M (reconstruction.py) a module's target mixes
what it gives in both flows, and those that write into the residual stream repair a share of its drift: so what the
layers before have lost is made up for, as far as calibration shows it (GPTAQ, arXiv 2504.02692, takes the float flow
alone as its target).
"""

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from component.checkpoint import reading as files
from component.checkpoint.carried import rest_of
from component.checkpoint.writer import CheckpointWriter
from component.flow.batches import windows_at_once
from component.flow.lockstep import lockstep
from component.format import integration
from component.format.packed import PackedLinear
from component.quantize import packing
from component.quantize.forms import FACTORED, MATRIX, WIDE, WIDE_OUTER, Form, chosen, packed_bytes
from component.quantize.gptq import Feedback, Grid, Quantized, expected_losses, feedback_of, gptq, round_to_nearest
from component.quantize.product import expected_loss, refit, round_product
from component.solve.moments import Moments, add_gram, add_product
from component.solve.reconstruction import target_moment
from utils.layers import (
    DecoderLayer,
    HeldLayers,
    advance,
    layer_inputs,
    map_tensors,
    run_layer,
    watching,
)
from utils.placement import Shelf
from utils.precision import full_precision
from utils.residuals import residual_writers


@dataclass(frozen=True, kw_only=True)
class Walk:
    """What a pass through the layers needs. windows: of calibration, (count, length) int64; None where no data goes
    through; shelf: for hidden states.
    """

    model: PreTrainedModel
    described: list[DecoderLayer]
    windows: Tensor | None
    device: torch.device
    shelf: Shelf


class Rounding(NamedTuple):
    """How GPTQ rounds. The ratios are those of M's target; share: of their bytes in float16 that the linears may take,
    where the factors alone take less it is spent as forms.py says.
    """

    grid: Grid
    mix_ratio: float
    drift_ratio: float
    share: float


class StoredFactors(NamedTuple):
    """What a factored linear stores, in float64: `inner` sees its input. rows: the outputs in the order of [I; outer]
    where inner holds pivot rows, None where they are those of `outer` as they stand."""

    inner: Tensor
    outer: Tensor
    rows: Tensor | None

    @classmethod
    def of(cls, linear: nn.Module) -> "StoredFactors":
        inner, outer = (getattr(linear, name).weight.double() for name in names_of(linear))
        perm: Tensor | None = getattr(linear, "perm", None)
        return cls(inner, outer, None if perm is None else perm.argsort())

    def product(self) -> Tensor:
        """(d_out, d_in), its rows in the linear's order."""
        product = self.outer @ self.inner
        return product if self.rows is None else torch.cat([self.inner, product])[self.rows.argsort()]


def names_of(linear: nn.Module) -> tuple[str, str]:
    """Of the factor that sees the input and the one behind it."""
    return integration.FACTORS["pifa" if hasattr(linear, "pivot") else "lowrank"]


@torch.no_grad()
def forms_of(walk: Walk, entries: Mapping[str, dict[str, Any]], rounding: Rounding) -> dict[str, str]:
    """Compressed linear -> the kind of form that its integers are to have, by one pass of the float model.

    entries: `layers` of the quantization config as it was. The walk has windows.
    """
    windows, device, grid = walk.windows, walk.device, rounding.grid
    assert windows is not None
    held = HeldLayers(walk.model)
    states, keywords = layer_inputs(walk.model, windows, lambda size: walk.shelf.room(size, device))
    batch = windows_at_once(windows.shape[1])
    modules: dict[str, list[Form]] = {}
    limit = 0.0
    for index, described in enumerate(tqdm(walk.described, desc="forms", unit="layer")):
        prefix = f"{described.name}."
        groups = groups_of(described, _inside(prefix, entries))
        grams: dict[str, Tensor] = {}

        def see(name: str, x: Tensor, _y: Tensor, *, grams: dict[str, Tensor] = grams) -> None:
            grams[name] = add_gram(grams.get(name), x)

        with held.filled(described.name, device) as layer, full_precision():
            kwargs = map_tensors(keywords[index], lambda tensor: tensor.to(device))
            with watching(layer, [group[0] for group in groups], see):
                advance(layer, states, kwargs, batch=batch)
            for group in groups:
                gram = grams[group[0]]
                feedback = feedback_of(gram, grid.act_order, f"{prefix}{group[0]}")
                for name in group:
                    linear, what = layer.get_submodule(name), f"{prefix}{name}"
                    modules[what] = priced(linear, gram, feedback, grid=grid, what=what)
                    limit += rounding.share * float16_bytes(linear)
    return chosen(modules, int(limit))


def priced(linear: nn.Module, gram: Tensor, feedback: Feedback, *, grid: Grid, what: str) -> list[Form]:
    """The forms that a module's integers can have. A dense linear has but one, and what it loses does not matter."""
    if isinstance(linear, nn.Linear):
        return [Form(MATRIX, 0.0, packed_bytes(linear.out_features, linear.in_features, grid))]
    factors = StoredFactors.of(linear)
    (inner, outer, rows), whole = factors, factors.product()
    index = 0 if rows is None else 4 * len(rows)
    loss = expected_losses(whole, feedback, grid, what=what).sum().item()
    forms = [Form(MATRIX, loss, packed_bytes(len(whole), whole.shape[1], grid))]
    for kind, bits in ((FACTORED, grid.bits), (WIDE_OUTER, WIDE)):
        if kind == FACTORED or bits > grid.bits:
            grids = grid, grid._replace(bits=bits)
            sizes = (packed_bytes(len(t), t.shape[1], g) for t, g in zip((inner, outer), grids, strict=True))
            pivots = rows is not None
            loss = expected_loss(inner, outer, gram=gram, feedback=feedback, grids=grids, what=what, pivots=pivots)
            forms.append(Form(kind, loss, sum(sizes) + index))
    energy = ((whole @ gram) * whole).sum().item() or 1.0
    return [form._replace(loss=form.loss / energy) for form in forms]


def float16_bytes(linear: nn.Module) -> int:
    """Of the linear's matrix or factors with their index, biases left out."""
    weights = [tensor for name, tensor in linear.named_parameters() if name.rpartition(".")[2] != "bias"]
    return 2 * sum(t.numel() for t in weights) + sum(4 * t.numel() for t in linear.buffers())


@torch.no_grad()
def quantize_model(
    walk: Walk,
    entries: Mapping[str, dict[str, Any]],
    rounding: Rounding,
    *,
    writer: CheckpointWriter,
    dtype: torch.dtype,
) -> None:
    """Replace the model's linears, in place, and write every shard that is not there yet.

    entries: `layers` of the quantization config as it will be; dtype: of the parameters that stay, in the end.
    """
    model, device = walk.model, walk.device
    held = HeldLayers(model)
    flows: tuple[Tensor, Tensor] | None = None
    keywords: list[dict[str, Any]] = []
    batch = 0
    if walk.windows is not None:
        batch = windows_at_once(walk.windows.shape[1])
        states, keywords = layer_inputs(model, walk.windows, lambda size: walk.shelf.room(2 * size, device))
        copied = walk.shelf.room(2 * states.nbytes, device)(states.shape, states.dtype).copy_(states)
        flows = states, copied
    for index, described in enumerate(tqdm(walk.described, desc="quantize", unit="layer")):
        shard, prefix = files.layer_shard(index), f"{described.name}."
        inside = _inside(prefix, entries)
        done = writer.finished(shard)
        with held.filled(described.name, device) as layer, full_precision():
            original = copy.deepcopy(layer) if flows else layer
            kwargs = map_tensors(keywords[index], lambda tensor: tensor.to(device)) if flows else {}
            if done:
                _fill(layer, inside, _inside(prefix, files.open_shard(writer.folder / shard)))
                if flows and index + 1 < len(walk.described):
                    advance(original, flows[0], kwargs, batch=batch)
                    advance(layer, flows[1], kwargs, batch=batch)
            elif flows:
                parts = flows[0].split(batch), flows[1].split(batch)
                _quantize_layer((original, layer), described, inside, rounding=rounding, parts=parts, kwargs=kwargs)
            else:
                for name in inside:
                    _round_to_nearest(layer, name, rounding.grid, what=f"{prefix}{name}")
        if not done:
            _cast(layer, dtype)
            writer.write(shard, {f"{prefix}{key}": t for key, t in layer.state_dict().items()})
    _cast(model, dtype)
    if not writer.finished(files.REST):
        writer.write(files.REST, rest_of(model, walk.described))


def _inside(prefix: str, named: Mapping[str, Any]) -> dict[str, Any]:
    """What has a name in the layer, by that name."""
    return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}


def _fill(layer: nn.Module, entries: dict[str, dict[str, Any]], stored: dict[str, Tensor]) -> None:
    """Make a float layer what a shard says. entries: of its linears, by name in the layer, as the tensors are."""
    for name, entry in entries.items():
        layer.set_submodule(name, integration.packed(layer.get_submodule(name), entry))
    layer.load_state_dict(stored)


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Its parameters alone: scales of packed linears are buffers and stay float16."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


def _quantize_layer(
    layers: tuple[nn.Module, nn.Module],
    described: DecoderLayer,
    entries: dict[str, dict[str, Any]],
    *,
    rounding: Rounding,
    parts: tuple[Sequence[Tensor], Sequence[Tensor]],
    kwargs: dict[str, Any],
) -> None:
    """Replace the second layer's linears, and the hidden states of both flows by what the two layers then give.

    layers: the float layer, and the copy of it that changes; entries: of its linears, by name in the layer; parts: the
    hidden states of both flows, by batch; kwargs: the layer's keyword arguments.
    """
    original, layer = layers
    groups = groups_of(described, entries)
    probe = parts[0][0][:1].to(next(layer.parameters()).device)
    streams = residual_writers(
        original, probe, output_of=lambda module: run_layer(module, probe, kwargs), linears=list(entries)
    )
    stops = {group[0]: streams.get(group[0]) for group in groups}
    with (
        lockstep(original, stops, parts[0], keywords=kwargs) as float_flow,
        lockstep(layer, stops, parts[1], keywords=kwargs) as flow,
    ):
        for group in groups:
            moments = Moments()
            for before, now in zip(float_flow.at(group[0]), flow.at(group[0]), strict=True):
                moments.gram = add_gram(moments.gram, now.x)
                moments.cross = add_product(moments.cross, before.x, now.x)
                if before.stream is not None and now.stream is not None:
                    moments.drift = add_product(moments.drift, before.stream - now.stream, now.x)
            assert moments.gram is not None
            feedback = feedback_of(moments.gram, rounding.grid.act_order, f"{described.name}.{group[0]}")
            for name in group:
                what = f"{described.name}.{name}"
                _quantize(layer, name, entries[name], rounding=rounding, moments=moments, feedback=feedback, what=what)
        for passes, states in zip((float_flow, flow), parts, strict=True):
            for part, output in zip(states, passes.outputs(), strict=True):
                part.copy_(output)


def groups_of(described: DecoderLayer, names: Collection[str]) -> list[list[str]]:
    """Compressed linears of a layer that share an input, in call order.

    described: of the layer whose nn.Linear are factors; the ones that see another factor's output lead no group.
    """
    groups = []
    first = {inner for inner, _ in integration.FACTORS.values()}
    for group in described.groups:
        linears = []
        for name in group:
            owner, _, factor = name.rpartition(".")
            if name in names:
                linears.append(name)
            elif owner in names and factor in first:
                linears.append(owner)
        if linears:
            groups.append(linears)
    return groups


def _quantize(
    layer: nn.Module,
    name: str,
    entry: dict[str, Any],
    *,
    rounding: Rounding,
    moments: Moments,
    feedback: Feedback,
    what: str,
) -> None:
    """GPTQ of a linear, in the form that its entry says. moments: of its input in both flows; feedback: of the gram."""
    linear, grid, gram = layer.get_submodule(name), rounding.grid, moments.gram
    assert gram is not None
    factors = None if isinstance(linear, nn.Linear) else StoredFactors.of(linear)
    weight = linear.get_parameter("weight") if factors is None else factors.product()
    target = target_moment(
        weight,
        gram,
        moments.cross,
        mix_ratio=rounding.mix_ratio,
        drift=moments.drift,
        drift_ratio=rounding.drift_ratio,
    )
    if factors is None or entry["kind"] == "dense":
        result = gptq(refit(weight, target, gram, what=what), feedback, grid, what=what)
        layer.set_submodule(name, _as_integers(result, grid, linear))
        return
    inner, outer, rows = factors
    ordered = target if rows is None else target[rows]
    grids = grid, grid._replace(bits=entry.get("outer_bits", grid.bits))
    pivots = rows is not None
    rounded = round_product(inner, outer, ordered, gram=gram, feedback=feedback, grids=grids, what=what, pivots=pivots)
    _put(linear, rounded, grids)


def _round_to_nearest(layer: nn.Module, name: str, grid: Grid, *, what: str) -> None:
    linear = layer.get_submodule(name)
    if isinstance(linear, nn.Linear):
        layer.set_submodule(name, _as_integers(round_to_nearest(linear.weight, grid, what), grid, linear))
        return
    inner, outer, _ = StoredFactors.of(linear)
    first, second = (round_to_nearest(factor, grid, what) for factor in (inner, outer))
    _put(linear, (first, second), (grid, grid))


def _put(linear: nn.Module, factors: tuple[Quantized, Quantized], grids: tuple[Grid, Grid]) -> None:
    for name, result, grid in zip(names_of(linear), factors, grids, strict=True):
        setattr(linear, name, _as_integers(result, grid, getattr(linear, name)))


def _as_integers(result: Quantized, grid: Grid, like: nn.Module) -> PackedLinear:
    """like: what had these weights, for its bias and its dtype."""
    codes, zeros = packing.pack_rows(result.codes, grid.bits), packing.pack_columns(result.zeros, grid.bits)
    bias: Any = like.bias
    return PackedLinear.from_packed(
        codes,
        result.scales,
        zeros,
        shape=(result.codes.shape[0], result.codes.shape[1]),
        bits=grid.bits,
        group_size=grid.group_size,
        bias=bias,
        dtype=next(like.parameters()).dtype,
    )
