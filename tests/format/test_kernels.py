"""component/format/kernels.py: every path is the dense layer, forward and backward."""

import importlib.util

import pytest
import torch
from torch import Tensor

from component.format import kernels
from component.format.kernels import pifa_linear, pivoted_product, reorder
from tests.tiny import rand, relative

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
HALF = [torch.float16, torch.bfloat16]
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")

D_IN, D_OUT = 7, 11
TOKENS = [(), (1,), (5,), (3, 7), (2, 2, 5), (0,), (2, 0)]
RANKS = [1, 4, 7]


@pytest.fixture(params=["few tokens", "rows", "features first", "padded"])
def memory(request, monkeypatch):
    """Each way in which Z is made and lies in memory, whatever this device would choose."""
    if request.param != "few tokens":
        monkeypatch.setattr(kernels, "FEW_TOKENS", 0)
    monkeypatch.setattr(kernels, "LARGE_RANK", 1 if request.param == "features first" else 1 << 20)
    if request.param == "padded":
        of = classmethod(lambda cls, x, rank, others: cls(-rank % kernels.ALIGNED, -others % kernels.ALIGNED))
        monkeypatch.setattr(kernels._Padding, "of", of)


def layer(d_in: int, d_out: int, rank: int, dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pivot rows, coefficients, perm and bias."""
    perm = torch.randperm(d_out, generator=torch.Generator().manual_seed(4)).int()
    pivot, coeff = rand(rank, d_in, seed=1) / d_in**0.5, rand(d_out - rank, rank, seed=2) / rank**0.5
    pivot, coeff, bias = (t.to(DEVICE, dtype) for t in (pivot, coeff, rand(d_out, seed=3)))
    return pivot, coeff, perm.to(DEVICE), bias


def given(*shape: int, seed: int = 0) -> Tensor:
    return rand(*shape, seed=seed).to(DEVICE)


def expected_z(x: Tensor, pivot: Tensor, coeff: Tensor) -> Tensor:
    x, pivot, coeff = x.double(), pivot.double(), coeff.double()
    return x @ torch.cat([pivot, coeff @ pivot]).T


def expected(x: Tensor, pivot: Tensor, coeff: Tensor, perm: Tensor, bias: Tensor | None = None) -> Tensor:
    y = expected_z(x, pivot, coeff)[..., perm.long()]
    return y if bias is None else y + bias.double()


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- forward


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_pivot_order(memory, poisoned, tokens, rank):
    pivot, coeff, _, bias = layer(D_IN, D_OUT, rank)
    x = given(*tokens, D_IN)
    close(pivoted_product(x, pivot, coeff), expected_z(x, pivot, coeff))
    close(pivoted_product(x, pivot, coeff, bias), expected_z(x, pivot, coeff) + bias)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_natural_order(memory, poisoned, tokens, rank):
    pivot, coeff, perm, bias = layer(D_IN, D_OUT, rank)
    x = given(*tokens, D_IN)
    for b in (None, bias):
        y = pifa_linear(x, pivot, coeff, perm, b)
        close(y, expected(x, pivot, coeff, perm, b))
        assert y.is_contiguous()


def test_no_coefficients_at_full_rank(memory, poisoned):
    pivot, coeff, perm, bias = layer(D_OUT, D_OUT, D_OUT)
    assert coeff.shape == (0, D_OUT)
    x = given(20, D_OUT)
    close(pifa_linear(x, pivot, coeff, perm, bias), x @ pivot[perm.long()].T + bias)
    close(pivoted_product(x, pivot, coeff), x @ pivot.T)


@pytest.mark.parametrize(
    "x",
    [
        given(D_IN, 20).T,
        given(20, 2 * D_IN)[:, ::2],
        given(40, D_IN)[::2],
        given(4, D_IN, 5).transpose(1, 2),
        given(5, 4, D_IN).transpose(0, 1),
        given(D_IN).expand(4, 5, D_IN),
        given(20, 1).expand(20, D_IN),
    ],
)
def test_any_strides_of_the_input(memory, x):
    pivot, coeff, perm, bias = layer(D_IN, D_OUT, 4)
    close(pifa_linear(x, pivot, coeff, perm, bias), expected(x, pivot, coeff, perm, bias))


def test_any_strides_of_the_factors(memory):
    pivot, coeff, perm, bias = layer(D_IN, D_OUT, 4)
    strided = (
        pivot.T.contiguous().T,
        coeff.repeat(1, 2)[:, :4],
        perm.repeat(2)[:D_OUT],
        torch.stack([bias, bias], 1)[:, 0],
    )
    for tokens in (2, 20):
        x = given(tokens, D_IN)
        close(pifa_linear(x, *strided), expected(x, pivot, coeff, perm, bias))


@pytest.mark.parametrize(
    "make", [torch.Tensor.clone, lambda z: z.mT.contiguous().mT, lambda z: z.repeat(1, 2)[:, :D_OUT]]
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_reorder(make, dtype):
    z, residual, perm = given(5, D_OUT), given(2, 5, D_OUT, seed=1), layer(D_IN, D_OUT, 4)[2].to(dtype)
    wanted = torch.stack([z[:, i] for i in perm.tolist()], dim=1)
    assert torch.equal(reorder(make(z), perm), wanted)
    close(reorder(make(z), perm, residual[0]), wanted + residual[0])
    close(reorder(make(z), perm, residual[0, 0]), wanted + residual[0, 0])
    close(reorder(make(z).expand(2, 5, D_OUT), perm, residual), wanted + residual)
    assert reorder(make(z)[:0], perm).shape == (0, D_OUT)


def test_perm_is_read_at_every_call():
    pivot, coeff, perm, _ = layer(D_IN, D_OUT, 4)
    x = given(20, D_IN)
    before = pifa_linear(x, pivot, coeff, perm)
    perm.copy_(perm.flip(0))
    close(pifa_linear(x, pivot, coeff, perm), before.flip(1))


@pytest.mark.parametrize("rank", [24, 21])
@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_rounds_no_worse_than_two_products(memory, poisoned, dtype, tokens, rank):
    pivot, coeff, perm, bias = layer(96, 80, rank, dtype)
    x = given(tokens, 96).to(dtype)
    y_p = x @ pivot.T
    plain = torch.cat([y_p, y_p @ coeff.T], dim=1)[:, perm.long()] + bias
    wanted = expected(x, pivot, coeff, perm, bias)
    found = pifa_linear(x, pivot, coeff, perm, bias)
    assert found.dtype == dtype
    assert relative(found.double(), wanted) <= 2 * relative(plain.double(), wanted)


# ---------------------------------------------------------------- backward


@pytest.mark.parametrize(("tokens", "rank"), [((), 4), ((3,), 4), ((2, 2), 1), ((3,), 7), ((0,), 4)])
def test_gradients(memory, tokens, rank):
    pivot, coeff, perm, bias = layer(D_IN, D_OUT, rank)
    inputs = [t.requires_grad_() for t in (given(*tokens, D_IN), pivot, coeff, bias)]

    def natural(x, pivot, coeff, bias):
        return pifa_linear(x, pivot, coeff, perm, bias)

    for function in (natural, pivoted_product):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_gradients_leave_what_they_come_from(memory):
    """The same at the second time: neither the outputs' gradient nor what forward kept is written to."""
    pivot, coeff, perm, _ = layer(D_IN, D_OUT, 4)
    inputs, upstream = [t.requires_grad_() for t in (given(20, D_IN), pivot, coeff)], given(20, D_OUT, seed=1)
    before = upstream.clone()
    for y in (pifa_linear(*inputs, perm), pivoted_product(*inputs)):
        first, second = (torch.autograd.grad(y, inputs, upstream, retain_graph=True) for _ in range(2))
        assert all(map(torch.equal, first, second)) and torch.equal(upstream, before)


def test_gradients_with_a_wider_bias(memory):
    pivot, coeff, perm, bias = layer(D_IN, D_OUT, 4)
    inputs = [t.requires_grad_() for t in (given(20, D_IN).float(), pivot.float(), coeff.float(), bias)]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    found, wanted = (torch.autograd.grad(pifa_linear(*i[:3], perm, i[3]).square().sum(), i) for i in (inputs, wide))
    for i, f, w in zip(inputs, found, wanted, strict=True):
        assert f.dtype == i.dtype and relative(f.double(), w) < 1e-5


def test_gradients_at_full_rank(memory):
    pivot, coeff, perm, bias = layer(D_IN, D_IN, D_IN)
    inputs = [t.requires_grad_() for t in (given(3, D_IN), pivot, coeff, bias)]
    assert torch.autograd.gradcheck(lambda x, p, c, b: pifa_linear(x, p, c, perm, b), inputs)


@pytest.mark.parametrize("shape", [(5, D_OUT), (D_OUT,), (1, D_OUT)])
def test_gradients_of_reorder(shape):
    z, residual = given(5, D_OUT).requires_grad_(), given(*shape, seed=1).requires_grad_()
    perm = layer(D_IN, D_OUT, 4)[2]
    assert torch.autograd.gradcheck(lambda z, residual: reorder(z, perm, residual), (z, residual))
    assert torch.autograd.gradgradcheck(lambda z, residual: reorder(z, perm, residual), (z, residual))
    (alone,) = torch.autograd.grad(reorder(z, perm, residual.detach()).sum(), z)  # an expanded gradient
    assert torch.equal(alone, torch.ones_like(z))


@pytest.mark.parametrize("wanted", range(4))
def test_only_what_is_asked_for_has_a_gradient(memory, wanted):
    pivot, coeff, perm, bias = layer(D_IN, D_OUT, 4)
    every = [t.clone().requires_grad_() for t in (given(3, 7, D_IN), pivot, coeff, bias)]
    pifa_linear(*every[:3], perm, every[3]).square().sum().backward()
    one = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(every)]
    pifa_linear(*one[:3], perm, one[3]).square().sum().backward()
    assert [t.grad is not None for t in one] == [i == wanted for i in range(4)]
    close(one[wanted].grad, every[wanted].grad)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_gradients(memory, dtype):
    pivot, coeff, perm, _ = layer(96, 80, 21, dtype)
    x, upstream = given(40, 96).to(dtype), given(40, 80, seed=1).to(dtype)

    def gradients(function, *inputs):
        inputs = [t.clone().requires_grad_() for t in inputs]
        return torch.autograd.grad(function(*inputs), inputs, upstream.to(inputs[0].dtype))

    def plain(x, pivot, coeff):
        y_p = x @ pivot.T
        return torch.cat([y_p, y_p @ coeff.T], dim=1)[:, perm.long()]

    exact = gradients(plain, x.double(), pivot.double(), coeff.double())
    rounded = gradients(plain, x, pivot, coeff)
    found = gradients(lambda *inputs: pifa_linear(*inputs, perm), x, pivot, coeff)
    for name, g, r, e in zip(("x", "pivot", "coeff"), found, rounded, exact, strict=True):
        assert relative(g.double(), e) <= 2 * relative(r.double(), e), name


# ---------------------------------------------------------------- compilers


@pytest.mark.parametrize("grad", [False, True])
def test_compiled_in_one_graph(memory, compiled, grad):
    pivot, coeff, perm, bias = layer(D_IN, D_OUT, 4)
    function = compiled(lambda x: pifa_linear(x, pivot, coeff, perm, bias) * 2)
    for tokens in [(1,), (5,), (6,), (3, 7), (3, 8)]:
        x = given(*tokens, D_IN).requires_grad_(grad)
        y, wanted = function(x), 2 * expected(x, pivot, coeff, perm, bias)
        close(y, wanted)
        if grad:
            close(*(torch.autograd.grad(output.square().sum(), x)[0] for output in (y, wanted)))
    perm.copy_(perm.flip(0))
    close(function(x), 2 * expected(x, pivot, coeff, perm, bias))


def test_compiled_in_pivot_order(memory, compiled):
    pivot, coeff, _, bias = layer(D_IN, D_OUT, 4)
    function = compiled(lambda x: pivoted_product(x, pivot, coeff, bias).sin())
    for tokens in [(5,), (6,), (3, 7)]:
        x = given(*tokens, D_IN)
        close(function(x), (expected_z(x, pivot, coeff) + bias).sin())


@pytest.mark.parametrize("needs_grad", [False, True])
def test_the_operator_is_what_it_says(memory, needs_grad):
    inputs = [t.requires_grad_(needs_grad) for t in (given(3, 7, D_IN), *layer(D_IN, D_OUT, 4)[:2])]
    torch.library.opcheck(torch.ops.pifa.product.default, inputs)


def test_a_second_copy_of_the_file_shares_the_operators():
    """A checkpoint that carries the file may be loaded where it is installed."""
    # beside the installed one, as relative imports need a package
    spec = importlib.util.spec_from_file_location("component.format.a_copy_of_kernels", kernels.__file__)
    copy = importlib.util.module_from_spec(spec)
    before = torch.ops.pifa.product.default
    spec.loader.exec_module(copy)
    assert torch.ops.pifa.product.default is before
    pivot, coeff, perm, bias = layer(D_IN, D_OUT, 4)
    x = given(20, D_IN).requires_grad_()
    for module in (copy, kernels):
        close(module.pifa_linear(x, pivot, coeff, perm, bias), expected(x, pivot, coeff, perm, bias))


@needs_gpu
@pytest.mark.parametrize("tokens", [1, 5, 100])
def test_captured_in_a_graph(tokens):
    pivot, coeff, perm, bias = layer(96, 80, 21, torch.float16)
    x = given(tokens, 96).half()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        pifa_linear(x, pivot, coeff, perm, bias)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = pifa_linear(x, pivot, coeff, perm, bias)
    for seed in range(3):
        x.copy_(given(tokens, 96, seed=seed))
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, pifa_linear(x, pivot, coeff, perm, bias))
