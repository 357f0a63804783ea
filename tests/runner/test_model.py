"""component/runner/model.py: the same tokens as transformers, for dense, low-rank, pivoted and mixed models."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from component.format.linear import LowRankLinear, PIFALinear
from component.format.narrow import PaddedHeads, PickedHeads
from component.runner.layout import Scratch
from component.runner.model import LeanModel
from component.runner.ops import in_order
from component.runner.stack import Stack
from tests import tiny
from utils.errors import UsageError

NEW = 12
KINDS = {
    "dense": ["dense"],
    "low-rank": ["lowrank"],
    "pivoted": ["pifa"],
    "mixed": ["pifa", "dense", "lowrank", "pifa"],
    "narrow": ["narrow", "dense"],
    "narrow beside factors": ["narrow", "pifa", "lowrank", "dense"],
}


def pivoted(linear: nn.Linear, rank: int, seed: int, identity: bool = False) -> PIFALinear:
    """A random pivoted layer of the same shape, with sorted pivots as pivoting leaves them."""
    d_out, d_in = linear.weight.shape
    rows = torch.randperm(d_out, generator=torch.Generator().manual_seed(seed))
    order = torch.cat([rows[:rank].sort().values, rows[rank:].sort().values])
    perm = torch.arange(d_out) if identity else order.argsort()
    pivots, coefficients = tiny.rand(rank, d_in, seed=seed), tiny.rand(d_out - rank, rank, seed=seed + 1)
    return PIFALinear.from_pivots(pivots / d_in**0.5, coefficients / rank**0.5, perm, linear.bias, linear.weight.dtype)


def narrowed(model: nn.Module, width: int, channels: int) -> Any:
    """Values and outputs with so many channels a head, the MLP with so many in all: random, but for the biases."""
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        like = {"dtype": attention.v_proj.weight.dtype}
        groups, size = model.config.num_key_value_heads, attention.head_dim
        for name, kind, heads in (
            ("v_proj", PaddedHeads, groups), ("o_proj", PickedHeads, model.config.num_attention_heads)
        ):  # fmt: skip
            old = getattr(attention, name)
            new = kind(old.in_features, old.out_features, heads, width, old.bias is not None, **like)
            new.weight.data = tiny.rand(*new.weight.shape, seed=heads).to(**like) / old.in_features**0.5
            if old.bias is not None:
                kept = old.bias.view(heads, size)[:, :width].flatten() if name == "v_proj" else old.bias
                new.bias.data = kept.clone()
            setattr(attention, name, new.requires_grad_(False))
        for name in ("gate_proj", "up_proj", "down_proj"):
            old = getattr(mlp, name)
            weight = old.weight[:, :channels] if name == "down_proj" else old.weight[:channels]
            new = nn.Linear(weight.shape[1], weight.shape[0], old.bias is not None, **like).requires_grad_(False)
            new.weight.copy_(weight)
            if old.bias is not None:
                new.bias.copy_(old.bias[: len(new.bias)])
            setattr(mlp, name, new)
    return model


def compressed(model: nn.Module, kinds: list[str]) -> Any:
    """Each decoder linear as one of `kinds` in turn, at ranks that are not round; narrow ones all at once."""
    if "narrow" in kinds:
        model = narrowed(model, 11, 77)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "layers" in name]
    for i, name in enumerate(names):
        linear = model.get_submodule(name)
        rank, kind = min(linear.weight.shape) // 2 + i % 3, kinds[i % len(kinds)]  # narrow: as it is by now
        if kind == "pifa":
            model.set_submodule(name, pivoted(linear, rank, seed=i))
        elif kind == "lowrank":
            u, v = tiny.rand(linear.out_features, rank, seed=i), tiny.rand(rank, linear.in_features, seed=i + 1)
            scale = (rank * linear.in_features) ** -0.5
            model.set_submodule(name, LowRankLinear.from_factors(u * scale, v, linear.bias, linear.weight.dtype))
    return model


def reference(model: Any, tokens: torch.Tensor, new: int = NEW, **options: Any) -> torch.Tensor:
    everywhere = torch.ones_like(tokens)
    return model.generate(tokens, max_new_tokens=new, do_sample=False, attention_mask=everywhere, **options)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("family", ["llama", "llama-gqa", "qwen2", "qwen3"])
def test_greedy_tokens_are_those_of_transformers(family, kinds, batch):
    model = compressed(tiny.build(family), KINDS[kinds])
    tokens = tiny.token_windows(batch, 7)
    expected = reference(model, tokens)
    lean = LeanModel.from_transformers(model, max_batch=3, max_length=32)
    assert torch.equal(lean.generate(tokens, NEW), expected)
    assert torch.equal(reference(model, tokens), expected), "the model no longer works on the stacked tensors"


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 32},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
        {
            "rope_parameters": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16, "rope_theta": 10000.0,
            }
        },
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}},
    ],
    ids=["biases", "head_dim", "linear", "llama3", "yarn"],
)  # fmt: skip
def test_what_a_config_may_change(changes):
    model = compressed(tiny.build("llama-gqa", **changes), ["pifa"])
    tokens = tiny.token_windows(2, 9)
    expected = reference(model, tokens)
    assert torch.equal(LeanModel.from_transformers(model, 2, 32).generate(tokens, NEW), expected)


def test_biases_of_narrow_heads():
    model = narrowed(tiny.build("llama-gqa", attention_bias=True, mlp_bias=True), 5, 30)
    tokens = tiny.token_windows(2, 9)
    expected = reference(model, tokens)
    assert torch.equal(LeanModel.from_transformers(model, 2, 32).generate(tokens, NEW), expected)


@pytest.mark.parametrize("width", [1, 8, 16])
def test_narrow_heads_end_in_a_column_of_zeros(width):
    """Whether or not alignment leaves a row of zeros behind them."""
    padded = PaddedHeads(16, 32, 2, width, bias=False)
    padded.weight.data = tiny.rand(2 * width, 16).float()
    stack, x = Stack([nn.Linear(16, 16, bias=False), padded.requires_grad_(False)]), tiny.rand(3, 16, seed=1).float()
    expected = padded(x)
    found = in_order(stack(x, Scratch.on(x.device)), stack.layout)[:, 16:]
    assert torch.equal(found == 0, expected == 0) and torch.allclose(found, expected, atol=1e-6)


def test_picked_heads_share_no_input():
    with pytest.raises(UsageError, match="which this runner does not do"):
        Stack([PickedHeads(16, 16, 2, 3), nn.Linear(16, 16)])


@pytest.mark.parametrize("kinds", KINDS)
def test_logits_of_every_position(kinds):
    """float64, so that a wrong term can't hide; the rotary tables are float32 in transformers too."""
    model = compressed(tiny.build("llama-gqa").double(), KINDS[kinds])
    tokens = tiny.token_windows(2, 9)
    expected = model(tokens).logits
    lean = LeanModel.from_transformers(model, 2, 16)
    assert tiny.relative(lean.prefill(tokens[:, :6], every_position=True), expected[:, :6]) < 1e-6
    for place in range(6, 9):
        assert tiny.relative(lean.decode(tokens[:, place]), expected[:, place]) < 1e-6


def test_end_of_text_ends_a_sequence():
    model = tiny.build("llama-gqa")
    tokens = tiny.token_windows(3, 7)
    free = reference(model, tokens, eos_token_id=None)
    model.generation_config.eos_token_id = [int(free[0, 9]), int(free[1, 11]), int(free[2, 10])]
    model.generation_config.pad_token_id = 1
    expected = reference(model, tokens)
    assert expected.shape[1] < free.shape[1] and (expected == 1).any()
    assert torch.equal(LeanModel.from_transformers(model, 3, 32).generate(tokens, NEW), expected)


def test_a_second_text_starts_anew():
    model = tiny.build("llama-gqa")
    lean = LeanModel.from_transformers(model, 3, 32)
    first, second = tiny.token_windows(3, 11), tiny.token_windows(2, 5, seed=1)
    lean.generate(first, NEW)
    assert torch.equal(lean.generate(second, NEW), reference(model, second))


def test_sampling_follows_the_generator():
    lean = LeanModel.from_transformers(tiny.build("llama-gqa"), 2, 32)
    tokens = tiny.token_windows(2, 5)
    draws = [
        lean.generate(tokens, NEW, temperature=1.0, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    cold = lean.generate(tokens, NEW, temperature=1e-4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(cold, lean.generate(tokens, NEW))


@pytest.mark.parametrize("kinds", KINDS)
def test_nothing_is_stored_twice(kinds):
    model = compressed(tiny.build("llama-gqa"), KINDS[kinds])
    lean = LeanModel.from_transformers(model, 1, 8)
    held = {tensor.untyped_storage().data_ptr() for tensor in _weights(lean)}
    theirs = {parameter.untyped_storage().data_ptr() for parameter in model.parameters() if parameter.dim() == 2}
    assert held == theirs
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def _weights(lean: LeanModel):
    weights = lean.weights
    stacks = [weights.head, *(s for layer in weights.layers for s in (layer.qkv, layer.o, layer.gate_up, layer.down))]
    return [weights.embedding, *(w for s in stacks for w in (s.first, *(c.weight for c in s.coefficients)))]


@pytest.mark.parametrize("identity", [True, False])
def test_gathers_only_where_pivots_are_scattered(identity):
    """Pivots that come first, as in a folded checkpoint, leave each module's outputs in two straight runs."""
    linears = [nn.Linear(16, 40, bias=False) for _ in range(2)]
    stack = Stack([pivoted(linear, 10, seed=i, identity=identity) for i, linear in enumerate(linears)])
    assert (stack.layout.runs is not None) == identity
    if identity:
        columns = [j + (low if j < split else high) for split, low, high in stack.layout.runs for j in range(40)]
        assert columns == stack.layout.columns.tolist()
    assert Stack(linears).layout.starts == (0, 48)


@pytest.mark.parametrize("family", ["phi3", "gemma2", "opt"])
def test_other_families_are_refused(family):
    with pytest.raises(UsageError, match=r"is not built like|is made of|capped"):
        LeanModel.from_transformers(tiny.build(family), 1, 8)


def test_a_model_that_computes_something_else_is_refused():
    """Granite has a LLaMA's modules and config names, and multiplies the stream by factors of its own."""
    config = AutoConfig.for_model("granite", **{**tiny.SHAPE, "residual_multiplier": 0.5})
    with pytest.raises(UsageError, match="computes something else: logits differ by"):
        LeanModel.from_transformers(AutoModelForCausalLM.from_config(config), 1, 8)


@pytest.mark.parametrize(
    ("family", "changes", "line"),
    [
        ("mistral", {}, "sliding window of 8 is shorter than max_length 32"),
        ("llama", {"hidden_act": "gelu"}, "another activation than SiLU"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "depend on"),
    ],
)
def test_what_it_does_not_do_is_refused(family, changes, line):
    model = tiny.build(family, **{"max_position_embeddings": 16, **changes})
    with pytest.raises(UsageError, match=line):
        LeanModel.from_transformers(model, 1, 32)


@pytest.mark.parametrize(
    ("path", "attribute", "value", "line"),
    [
        ("model.layers.1.input_layernorm", "variance_epsilon", 1e-3, "several epsilons"),
        ("model.layers.1.self_attn", "scaling", 1.0, "several kinds"),
    ],
)
def test_layers_that_differ_are_refused(path, attribute, value, line):
    model = tiny.build("llama")
    setattr(model.get_submodule(path), attribute, value)
    with pytest.raises(UsageError, match=line):
        LeanModel.from_transformers(model, 1, 8)


def test_a_window_that_is_never_reached_does_not_matter():
    model = tiny.build("mistral")
    tokens = tiny.token_windows(1, 3)
    expected = reference(model, tokens, new=5)
    assert torch.equal(LeanModel.from_transformers(model, 1, 8).generate(tokens, 5), expected)


def test_what_does_not_fit_is_refused():
    lean = LeanModel.from_transformers(tiny.build("llama-gqa"), 2, 8)
    with pytest.raises(UsageError, match="3 x 4 tokens do not fit the cache of 2 x 8"):
        lean.prefill(tiny.token_windows(3, 4))
    with pytest.raises(UsageError, match="6 \\+ 3 tokens do not fit"):
        lean.generate(tiny.token_windows(1, 6), 3)
    lean.prefill(tiny.token_windows(2, 7))
    with pytest.raises(UsageError, match="the 2 sequences of the last prefill, not 1"):
        lean.decode(torch.zeros(1, dtype=torch.long))
    lean.decode(torch.zeros(2, dtype=torch.long))
    with pytest.raises(UsageError, match="the cache is full: 8 tokens"):
        lean.decode(torch.zeros(2, dtype=torch.long))
