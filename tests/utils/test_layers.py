"""utils/layers.py: decoder layers, groups and inputs of every family, found by looking."""

import pytest
import torch
from torch import nn

from tests import tiny
from utils import layers
from utils.errors import UsageError

LLAMA = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
PHI3 = (("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",))
OPT = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.out_proj",), ("fc1",), ("fc2",))
GROUPS = dict.fromkeys(tiny.FAMILIES, LLAMA) | {"phi3": PHI3, "opt": OPT}
LAYERS = dict.fromkeys(tiny.FAMILIES, "model.layers") | {"opt": "model.decoder.layers"}


@pytest.mark.parametrize(("family", "attention"), tiny.ATTENTION)
def test_groups_are_the_linears_that_share_an_input(family, attention):
    described = layers.describe_layers(tiny.build(family, attention))
    assert [layer.name for layer in described] == [f"{LAYERS[family]}.{index}" for index in range(2)]
    for layer in described:
        # attention calls its linears in the order of its code: within a group the order is free
        assert [set(group) for group in layer.groups] == [set(group) for group in GROUPS[family]]
        assert layer.attention == {name for name in layer.linears() if name.startswith("self_attn")}
        assert sorted(layer.linears()) == sorted(name for group in GROUPS[family] for name in group)


def whole_model(model: nn.Module, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the first decoder layer is given and the last one returns in a forward pass of the whole model."""
    modules = [layer for _, layer in layers.decoder_layers(model)]
    seen = {}

    def first_input(_module, args, kwargs):
        seen["first"] = args[0] if args else kwargs["hidden_states"]

    def last_output(_module, _args, output):
        seen["last"] = output[0] if isinstance(output, tuple) else output

    handles = [
        modules[0].register_forward_pre_hook(first_input, with_kwargs=True),
        modules[-1].register_forward_hook(last_output),
    ]
    with torch.no_grad():
        model(windows, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen["first"], seen["last"]


@pytest.mark.parametrize(("family", "attention"), tiny.ATTENTION)
def test_running_the_layers_one_by_one_is_running_the_model(family, attention):
    """For windows longer than a sliding window, and any batch though the keywords come from one window."""
    model = tiny.build(family, attention)
    windows = tiny.token_windows(5, 24)
    first, last = whole_model(model, windows)
    hidden, keywords = layers.layer_inputs(model, windows)
    torch.testing.assert_close(hidden, first, rtol=0, atol=1e-6)
    with torch.no_grad():
        for (_, layer), kwargs in zip(layers.decoder_layers(model), keywords, strict=True):
            hidden = torch.cat([layers.run_layer(layer, part, kwargs) for part in hidden.split(2)])
    torch.testing.assert_close(hidden, last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "attention"), tiny.ATTENTION)
def test_later_tokens_do_not_reach_earlier_ones(family, attention):
    """Replayed keywords keep the causal mask."""
    model = tiny.build(family, attention)
    windows = tiny.token_windows(2, 24)
    windows[1, :12] = windows[0, :12]
    hidden, keywords = layers.layer_inputs(model, windows)
    with torch.no_grad():
        for (_, layer), kwargs in zip(layers.decoder_layers(model), keywords, strict=True):
            hidden = layers.run_layer(layer, hidden, kwargs)
    torch.testing.assert_close(hidden[0, :12], hidden[1, :12], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(hidden[0, 12:], hidden[1, 12:], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_looking_leaves_the_model_as_it_was(family):
    model, windows = tiny.build(family), tiny.token_windows(2, 16)
    with torch.no_grad():
        before = model(windows).logits
        layers.describe_layers(model)
        layers.layer_inputs(model, windows)
        assert torch.equal(model(windows).logits, before)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_layers_are_restored_after_an_error():
    model = tiny.build()
    with pytest.raises((IndexError, RuntimeError)):
        layers.layer_inputs(model, torch.full((1, 4), 10**6))
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_watching_sees_inputs_and_outputs_and_leaves_no_hook():
    model, seen = tiny.build(), {}
    layer = model.model.layers[0].mlp
    x = tiny.rand(3, 64).float()
    names = ["gate_proj", "down_proj"]
    with layers.watching(layer, names, lambda name, *values: seen.update({name: values})):
        y = layer(x)
    assert list(seen) == names
    assert seen["gate_proj"][0] is x and seen["down_proj"][1] is y
    assert torch.equal(seen["gate_proj"][1], layer.gate_proj(x))
    with pytest.raises(RuntimeError), layers.watching(layer, names, lambda *_: pytest.fail()):
        raise RuntimeError
    assert torch.equal(layer(x), y)


def test_linears_that_are_never_called_are_told_apart():
    model = tiny.build()
    model.model.layers[0].spare = nn.Linear(64, 64)
    described = layers.describe_layers(model)
    assert layers.uncalled_linears(model.model.layers[0], described[0]) == ["spare"]
    assert layers.uncalled_linears(model.model.layers[1], described[1]) == []
    assert [set(group) for group in described[0].groups] == [set(group) for group in LLAMA]


def test_a_model_without_decoder_linears_is_refused():
    model = tiny.build()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            model.set_submodule(name, nn.Identity())
    with pytest.raises(UsageError, match="no decoder layers with linears"):
        layers.describe_layers(model)


def test_map_tensors_reaches_into_containers():
    value = {"a": [torch.ones(2), (torch.ones(1), None)], "b": 3}
    result = layers.map_tensors(value, lambda tensor: tensor + 1)
    assert result["b"] == 3 and result["a"][1][1] is None and isinstance(result["a"][1], tuple)
    assert torch.equal(result["a"][0], torch.full((2,), 2.0)) and torch.equal(result["a"][1][0], torch.full((1,), 2.0))
