"""component/format/linear.py: both layers are the dense layer they stand for, forward and backward."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from component.format import linear as linear_file
from component.format.linear import LowRankLinear, PIFALinear
from tests.tiny import rand

D_IN, D_OUT, RANK = 7, 9, 4
KINDS = [LowRankLinear, PIFALinear]


def make(kind, bias: bool, d_in: int = D_IN, d_out: int = D_OUT, rank: int = RANK, dtype=torch.float64):
    """A layer with random numbers, and the dense weight and bias it stands for, multiplied by hand."""
    b = rand(d_out, seed=3) if bias else None
    if kind is LowRankLinear:
        u, v = rand(d_out, rank, seed=1), rand(rank, d_in, seed=2)
        return LowRankLinear.from_factors(u, v, b, dtype), u @ v, b
    rows, coefficients = rand(rank, d_in, seed=1), rand(d_out - rank, rank, seed=2)
    perm = torch.randperm(d_out, generator=torch.Generator().manual_seed(4))
    stack = torch.cat([rows, coefficients @ rows])
    weight = torch.stack([stack[column] for column in perm.tolist()])
    return PIFALinear.from_pivots(rows, coefficients, perm, b, dtype), weight, b


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_the_dense_layer(kind, bias):
    layer, weight, b = make(kind, bias)
    for shape in [(D_IN,), (5, D_IN), (2, 3, D_IN)]:
        x = rand(*shape, seed=5)
        expected = x @ weight.T + (0 if b is None else b)
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.dense_weight(), weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_backward(kind, bias):
    layer, _, _ = make(kind, bias)
    names = [name for name, _ in layer.named_parameters()]
    values = [parameter.detach().clone().requires_grad_() for parameter in layer.parameters()]
    x = rand(3, D_IN, seed=5).requires_grad_()

    def call(x, *parameters):
        return functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *values))
    assert ("bias" in names) == bias


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_input_is_that_of_the_dense_layer(kind):
    layer, weight, _ = make(kind, True)
    x = rand(2, 3, D_IN, seed=5).requires_grad_()
    upstream = rand(2, 3, D_OUT, seed=6)
    layer(x).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_constructor_only_allocates(kind, bias):
    """On the meta device nothing can be computed, so a constructor that works there allocates at most."""
    layer = kind(D_IN, D_OUT, RANK, bias, device="meta", dtype=torch.float16)
    tensors = layer.state_dict()
    assert {t.device.type for t in tensors.values()} == {"meta"}
    assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.float16}
    assert tensors["weight"].shape == (0,)
    assert ("bias" in tensors) == bias
    same, _, _ = make(kind, bias)
    assert {name: t.shape for name, t in tensors.items()} == {name: t.shape for name, t in same.state_dict().items()}


def test_names_and_shapes_are_those_of_the_format():
    low_rank, pivots = (make(kind, True)[0].state_dict() for kind in KINDS)
    assert {name: tuple(t.shape) for name, t in low_rank.items()} == {
        "weight": (0,), "bias": (D_OUT,), "v.weight": (RANK, D_IN), "u.weight": (D_OUT, RANK),
    }  # fmt: skip
    assert {name: tuple(t.shape) for name, t in pivots.items()} == {
        "weight": (0,), "bias": (D_OUT,), "perm": (D_OUT,),
        "pivot.weight": (RANK, D_IN), "coeff.weight": (D_OUT - RANK, RANK),
    }  # fmt: skip
    assert pivots["perm"].dtype == torch.int32


def test_a_changed_perm_counts():
    layer, _, b = make(PIFALinear, True)
    x = rand(5, D_IN, seed=5)
    before = layer(x) - b
    order = torch.arange(D_OUT).flip(0)
    layer.perm.copy_(layer.perm[order])
    torch.testing.assert_close(layer(x) - b, before[:, order], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x @ layer.dense_weight().T, before[:, order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("d_in", "d_out", "rank"), [(7, 4, 4), (4, 7, 4), (5, 5, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_smallest_and_largest_rank(kind, d_in, d_out, rank):
    """At rank d_out the pivoted layer has no coefficients at all."""
    layer, weight, b = make(kind, True, d_in, d_out, rank)
    x = rand(3, d_in, seed=5)
    torch.testing.assert_close(layer(x), x @ weight.T + b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", [0, -1, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_impossible_ranks_are_refused(kind, rank):
    with pytest.raises(ValueError, match=f"rank {rank} is outside 1..7"):
        kind(D_IN, D_OUT, rank)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_stays_in_its_dtype(kind, dtype):
    layer, weight, _ = make(kind, True, dtype=dtype)
    assert layer(rand(2, D_IN).to(dtype)).dtype == dtype
    assert layer.dense_weight().dtype == dtype
    torch.testing.assert_close(layer.dense_weight().double(), weight, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_repr_tells_the_sizes(kind):
    assert "in_features=7, out_features=9, rank=4, bias=False" in repr(make(kind, False)[0])


# ---------------------------------------------------------------- the inner linears of a pivoted layer


@pytest.fixture
def without_kernels(monkeypatch):
    """The fast path must not be taken."""

    def refuse(*_):
        raise AssertionError("the inner linears were not called as modules")

    monkeypatch.setattr(linear_file, "pifa_linear", refuse)


class Adapted(nn.Module):
    """An adapter around a linear, as LoRA is: its output plus a low-rank one."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.down, self.up = rand(2, base.in_features, seed=7), rand(base.out_features, 2, seed=8)

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("names", [("pivot",), ("coeff",), ("pivot", "coeff")])
def test_adapters_count(without_kernels, names, tokens):
    layer, _, b = make(PIFALinear, True)
    adapted = {name: Adapted(getattr(layer, name)) for name in names}
    for name, module in adapted.items():
        setattr(layer, name, module)
    factors = {name: getattr(make(PIFALinear, True)[0], name).weight.detach() for name in ("pivot", "coeff")}
    factors |= {name: factors[name] + module.up @ module.down for name, module in adapted.items()}
    rows = torch.cat([factors["pivot"], factors["coeff"] @ factors["pivot"]])[layer.perm.long()]
    x = rand(tokens, D_IN, seed=5)
    torch.testing.assert_close(layer(x), x @ rows.T + b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["pivot", "coeff"])
def test_hooks_run(without_kernels, name):
    x = rand(3, D_IN, seed=5).requires_grad_()
    for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        layer, weight, b = make(PIFALinear, True)
        calls = []
        getattr(getattr(layer, name), register)(lambda *_, calls=calls: calls.append(1))
        y = layer(x)
        y.sum().backward()
        assert len(calls) == 1, register
        torch.testing.assert_close(y, x @ weight.T + b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["pivot", "coeff"])
def test_what_changes_a_linear_counts(without_kernels, name):
    """A forward of its own (offloading does so), a bias, a parametrization, a weight that is no plain tensor."""

    class Wrapped(nn.Parameter):
        pass

    class Halved(nn.Module):
        def forward(self, weight):
            return weight / 2

    def own_forward(linear):
        linear.forward = lambda x: nn.functional.linear(x, linear.weight / 2)

    def biased(linear):
        linear.weight.data /= 2
        linear.bias = nn.Parameter(torch.zeros(linear.out_features, dtype=torch.float64))

    def parametrized(linear):
        nn.utils.parametrize.register_parametrization(linear, "weight", Halved())

    def subclassed(linear):
        linear.weight = Wrapped(linear.weight.detach() / 2)

    x = rand(3, D_IN, seed=5)
    rows, coefficients, perm = (
        make(PIFALinear, False)[0].state_dict()[f] for f in ("pivot.weight", "coeff.weight", "perm")
    )
    factors = [rows / 2, coefficients] if name == "pivot" else [rows, coefficients / 2]
    wanted = PIFALinear.from_pivots(*factors, perm, None, torch.float64).dense_weight()
    for change in (own_forward, biased, parametrized, subclassed):
        layer, _, _ = make(PIFALinear, False)
        change(getattr(layer, name))
        torch.testing.assert_close(layer(x), x @ wanted.T, rtol=1e-12, atol=1e-12, msg=change.__name__)


@pytest.mark.parametrize("tokens", [3, 40])
def test_autocast(tokens):
    """The layer takes single-precision inputs and computes in half precision, as nn.Linear does."""
    layer, weight, b = make(PIFALinear, True, dtype=torch.float32)
    x = rand(tokens, D_IN, seed=5).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), x.double() @ weight.T + b, rtol=0.05, atol=0.2)


@pytest.mark.parametrize("tokens", [(), (1,), (40,), (0,), (4, 10)])
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_tokens(kind, tokens):
    layer, weight, b = make(kind, True)
    x = rand(*tokens, D_IN, seed=5)
    torch.testing.assert_close(layer(x), x @ weight.T + b, rtol=1e-12, atol=1e-12)


def test_compiled_in_one_graph():
    torch._dynamo.reset()
    layer, weight, b = make(PIFALinear, True)
    function = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for tokens in (3, 40, 41):
            x = rand(tokens, D_IN, seed=5)
            torch.testing.assert_close(function(x), x @ weight.T + b, rtol=1e-12, atol=1e-12)
