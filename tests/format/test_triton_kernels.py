"""component/format/triton_kernels.py: every kernel is the plain expression. On a GPU, or in Triton's interpreter.

Without a GPU: `TRITON_INTERPRET=1 pytest tests/format/test_triton_kernels.py`, where triton is installed.
"""

import pytest
import torch

from component.format import kernels
from component.format.kernels import pifa_linear, reorder
from tests.format.test_kernels import D_IN, HALF, expected, given, layer
from tests.tiny import INTERPRETED, needs_triton, relative

pytestmark = needs_triton

# d_in, d_out and rank, none of them a power of two; a program takes the interpreter 15 ms
ODD = (24, 14, 5) if INTERPRETED else (96, 80, 21)
EVEN = (24, 16, 8) if INTERPRETED else (96, 80, 24)
LONG = (2100, 8, 5) if INTERPRETED else (2100, 40, 30)  # more than one strip


@pytest.fixture
def triton(monkeypatch):
    """The kernels, taken on the device under test whatever it is."""
    monkeypatch.setattr(kernels, "_runs_triton", lambda x: True)
    from component.format import triton_kernels

    return triton_kernels


@pytest.mark.parametrize("columns", [64, 8192])
@pytest.mark.parametrize("width", [3, 64, 140 if INTERPRETED else 300])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64])
def test_columns_are_taken(triton, poisoned, monkeypatch, dtype, width, columns):
    monkeypatch.setattr(triton, "COLUMNS", columns)
    perm = layer(D_IN, width, 1)[2]
    for z in (given(7, width).to(dtype), given(7, width + 5).to(dtype)[:, 5:]):
        for residual in (None, given(7, width, seed=1).to(dtype), given(width, seed=1).to(dtype), given(width, seed=1)):
            wanted = z[:, perm.long()] if residual is None else z[:, perm.long()] + residual
            for index in (perm, perm.long()):
                found = reorder(z, index, residual)
                assert found.dtype == wanted.dtype
                torch.testing.assert_close(found, wanted)
    assert reorder(z[:0], perm).shape == (0, width)


@pytest.mark.parametrize(("d_in", "d_out", "rank"), [(7, 11, 4), EVEN, ODD, (9, 5, 5), (5, 9, 1), LONG])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_one_token(triton, poisoned, dtype, d_in, d_out, rank):
    pivot, coeff, perm, bias = layer(d_in, d_out, rank, dtype)
    x = given(1, d_in).to(dtype)
    y_p = x @ pivot.T
    plain = torch.cat([y_p, y_p @ coeff.T], dim=1)[:, perm.long()]
    for b in (None, bias):
        found = pifa_linear(x, pivot, coeff, perm, b)
        wanted = expected(x, pivot, coeff, perm, b)
        rounded = relative((plain if b is None else plain + b).double(), wanted)
        assert found.dtype == dtype
        # one product in eleven numbers may be luckier than its neighbour: a few units in the last place are allowed
        assert relative(found.double(), wanted) <= 2 * max(rounded, torch.finfo(dtype).eps)
        assert torch.equal(pifa_linear(x[0], pivot, coeff, perm, b), found[0])
        assert torch.equal(pifa_linear(x[None], pivot, coeff, perm, b), found[None])


def test_one_token_takes_other_strides_and_gradients(triton):
    pivot, coeff, perm, bias = layer(*ODD, torch.float32)
    x = given(ODD[0], 2).float()[:, 0]
    wanted = expected(x, pivot, coeff, perm, bias)
    for p, c in [
        (pivot, coeff),
        (pivot.repeat(1, 2)[:, : ODD[0]], coeff.repeat(1, 2)[:, : ODD[2]]),
        (pivot.T.contiguous().T, coeff),
    ]:
        torch.testing.assert_close(pifa_linear(x, p, c, perm, bias).double(), wanted, rtol=1e-5, atol=1e-5)
    x.requires_grad_()
    pifa_linear(x, pivot, coeff, perm, bias).sum().backward()
    wanted = (coeff.double() @ pivot.double()).sum(0) + pivot.double().sum(0)
    torch.testing.assert_close(x.grad.double(), wanted, rtol=1e-4, atol=1e-5)


def test_one_token_compiled_in_one_graph(triton, compiled):
    pivot, coeff, perm, bias = layer(*ODD, torch.float32)
    function = compiled(lambda x: pifa_linear(x, pivot, coeff, perm, bias) * 2)
    x = given(1, 1, ODD[0]).float()
    torch.testing.assert_close(function(x).double(), 2 * expected(x, pivot, coeff, perm, bias), rtol=1e-5, atol=1e-5)
    torch.library.opcheck(torch.ops.pifa.one_token.default, (x, pivot, coeff, perm, bias))
