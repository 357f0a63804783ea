"""component/channels/mixing.py: factors and fewer channels in one layer, fitted to what reaches them."""

from functools import partial

import pytest
import torch

from component.channels.by_output import (
    channel_order,
)
from component.channels.flatllm import compensated
from component.channels.mixing import Mixing
from component.channels.parts import parts_of
from component.flow.means import Flows, Means
from component.flow.streaming import Compression, compress_layers
from component.format.linear import LowRankLinear
from component.format.narrow import PaddedHeads, PickedHeads
from component.ranks.sizes import DENSE, Channels, Rank
from component.solve.solvers import make_solver
from tests import tiny
from tests.tiny import gram_of, relative
from utils.layers import HeldLayers, describe_layers

CPU = torch.device("cpu")
WINDOWS = tiny.token_windows(6, 24)


def mixed(model, ranks, mix_ratio=0.25, ridge=1e-6):
    """(plan, the model with its layers made by Mixing). ranks(name): Rank, Channels or DENSE of a linear."""
    described = describe_layers(model)
    parts = {layer.name: parts_of(model.get_submodule(layer.name), layer) for layer in described}
    plan = {f"{layer.name}.{name}": ranks(name) for layer in described for name in layer.linears()}
    solver = make_solver("auto", None, mix_ratio, drift_ratio=0.5, ridge=ridge)
    how = Mixing(parts, damping=ridge, weighting=None)
    flows, means = Flows(WINDOWS, whitening=6, reconstruction=6), Means(CPU, HeldLayers(model), batch=2)
    compression = Compression(plan, solver, dtype=model.dtype, layer_solver=how)
    layers = list(compress_layers(model, described, compression, flows=flows, means=means))
    for index, layer in layers:
        model.set_submodule(described[index].name, layer)
    return plan, model


@pytest.mark.parametrize("family", ["llama", "llama-gqa", "qwen2", "qwen3", "mistral"])
def test_all_channels_beside_full_ranks_give_the_dense_model(family):
    model = tiny.build(family).double()
    before = model(WINDOWS).logits
    part = parts_of(model.model.layers[0], describe_layers(model)[0])
    counts = {part.value: Channels(part.head_dim), part.output: Channels(part.head_dim)}
    counts |= dict.fromkeys(part.mlp, Channels(part.channels))
    _, model = mixed(model, lambda name: counts.get(name, DENSE))
    assert relative(model(WINDOWS).logits, before) < 1e-10
    assert isinstance(model.model.layers[1].self_attn.v_proj, PaddedHeads)
    assert isinstance(model.model.layers[1].self_attn.o_proj, PickedHeads)


def test_factors_and_channels_in_one_layer():
    def ranks(count, name):
        heads = dict.fromkeys(("v_proj", "o_proj"), Channels(count))
        return {"q_proj": Rank(30), "k_proj": Rank(20), **heads}.get(name.rsplit(".")[-1], Rank(40))

    errors = []
    for count in (5, 11, 15):
        model = tiny.build().double()
        before = model(WINDOWS).logits
        _, model = mixed(model, partial(ranks, count))
        errors.append(relative(model(WINDOWS).logits, before))
    layer = model.model.layers[0]
    assert isinstance(layer.self_attn.q_proj, LowRankLinear) and isinstance(layer.mlp.up_proj, LowRankLinear)
    assert isinstance(layer.self_attn.v_proj, PaddedHeads) and errors[2] < errors[1] < errors[0] < 1


def test_the_last_projection_is_fitted_to_what_reaches_it():
    """The target that factors have: the mixture of the flows, and half of the drift of the stream."""

    def ranks(name):
        return Channels(60) if "mlp" in name else Rank(50)

    name, dense = "model.layers.1.mlp", tiny.build().double()
    _, model = mixed(tiny.build().double(), ranks, 0.25)
    found, original = model.get_submodule(name), dense.get_submodule(name)

    def states(of) -> tuple[torch.Tensor, torch.Tensor]:
        seen = {}
        places = {"z": of.get_submodule(f"{name}.down_proj"), "h": of.model.layers[1].post_attention_layernorm}
        handles = [
            one.register_forward_pre_hook(lambda _m, args, key=key: seen.update({key: args[0]}))
            for key, one in places.items()
        ]
        of(WINDOWS)
        for handle in handles:
            handle.remove()
        return seen["z"].flatten(0, 1).T, seen["h"].flatten(0, 1).T

    z_dense, h_dense = states(dense)
    model.set_submodule(name, original)
    z, h = states(model)
    moment, weight = gram_of(z), original.down_proj.weight
    target = weight @ (0.25 * z_dense @ z.T + 0.75 * moment) + 0.5 * (h_dense - h) @ z.T
    kept = channel_order(weight, moment, 1e-6)[:60].sort().values
    assert relative(found.down_proj.weight, compensated(weight, target, moment, kept=kept, damping=1e-6)) < 1e-4
    assert torch.equal(found.up_proj.weight, original.up_proj.weight[kept])
