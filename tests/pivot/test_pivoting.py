"""component/pivot/pivoting.py: pivoting loses nothing, at the same rank or below it."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import component.pivot.pivoting
from component.format.linear import PIFALinear
from component.pivot.pivoting import (
    LARGEST_COEFFICIENT,
    LARGEST_SHARED_COEFFICIENT,
    Pivots,
    coefficients_of,
    common_rows,
    exchange,
    pivot,
    pivot_together,
    surely_full_rank,
)
from tests.tiny import rand, relative
from utils.errors import RunError

SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(0, 10**6))


def assembled(pivots: Pivots) -> Tensor:
    """[W_p; C W_p] in order, row by row."""
    stack = torch.cat([pivots.pivot_rows, pivots.coefficients @ pivots.pivot_rows])
    return torch.stack([stack[place] for place in pivots.perm.tolist()])


def check(u: Tensor, v: Tensor) -> Pivots:
    """All that holds for any input, at any rank."""
    pivots = pivot(u, v, "layer 3")
    d_out, rank = u.shape[0], pivots.pivot_rows.shape[0]
    assert relative(assembled(pivots), u.double() @ v.double()) < 1e-12
    assert pivots.coefficients.shape == (d_out - rank, rank)
    assert pivots.coefficients.numel() == 0 or pivots.coefficients.abs().max() <= LARGEST_COEFFICIENT + 1e-9
    assert pivots.perm.dtype == torch.int32 and sorted(pivots.perm.tolist()) == list(range(d_out))
    # sorted: places 0..r-1 of the stack appear in that order among the outputs, and so do the others
    order = pivots.perm.tolist()
    assert [p for p in order if p < rank] == list(range(rank))
    assert [p for p in order if p >= rank] == list(range(rank, d_out))
    return pivots


@settings(max_examples=100)
@given(SHAPES, st.data())
def test_reproduces_the_product_at_the_same_rank(shape, data):
    m, n, seed = shape
    rank = data.draw(st.integers(1, min(m, n)))
    assert check(rand(m, rank, seed=seed), rand(rank, n, seed=seed + 1)).pivot_rows.shape == (rank, n)


@settings(max_examples=100)
@given(SHAPES, st.data())
def test_reproduces_products_with_a_steep_spectrum(shape, data):
    """Singular values down to 1e-6 of the first, hidden by a mixing of the columns."""
    m, n, seed = shape
    rank = data.draw(st.integers(1, min(m, n)))
    scales = torch.logspace(0, -data.draw(st.integers(0, 6)), rank, dtype=torch.float64)
    mixing = torch.linalg.qr(rand(rank, rank, seed=seed + 2)).Q
    check(rand(m, rank, seed=seed) * scales @ mixing, mixing.T @ rand(rank, n, seed=seed + 1))


@given(SHAPES, st.data())
def test_a_deficient_product_is_stored_at_its_own_rank(shape, data):
    m, n, seed = shape
    rank = data.draw(st.integers(1, min(m, n)))
    true_rank = data.draw(st.integers(1, rank))
    u = rand(m, true_rank, seed=seed) @ rand(true_rank, rank, seed=seed + 1)
    assert check(u, rand(rank, n, seed=seed + 2)).pivot_rows.shape[0] == true_rank


@pytest.mark.parametrize("deficient", ["u", "v", "product"])
def test_a_lower_rank_is_logged(deficient, caplog):
    u, v = rand(12, 5), rand(5, 9, seed=1)
    if deficient == "u":
        u[:, 3] = u[:, 0] + u[:, 1]
    elif deficient == "v":
        v[3] = v[0] - v[1]
    else:  # two columns of u meet the same row of v: each factor has the full rank, but not so the product
        u, v = torch.cat([u, u[:, :1]], dim=1), torch.cat([v, v[:1]])
    kept = check(u, v).pivot_rows.shape[0]
    assert kept == {"u": 4, "v": 4, "product": 5}[deficient]
    assert [m for m in caplog.messages if m.startswith(f"layer 3: its numerical rank is {kept}, not {u.shape[1]}")]


def test_a_full_rank_product_is_not_logged(caplog):
    check(rand(12, 5), rand(5, 9, seed=1))
    assert caplog.messages == []


def test_zero_is_stored_at_rank_one():
    pivots = pivot(torch.zeros(6, 3), torch.zeros(3, 4))
    assert pivots.pivot_rows.shape == (1, 4)
    assert torch.equal(assembled(pivots), torch.zeros(6, 4, dtype=torch.float64))


def test_swaps_bring_large_coefficients_down():
    """Rows that grow slowly are what elimination with row pivoting alone is bad at: its coefficients double."""
    n = 12
    lower = torch.eye(n, dtype=torch.float64) - torch.ones(n, n, dtype=torch.float64).tril(-1)
    u = torch.cat([lower, -torch.ones(4, n, dtype=torch.float64)])
    check(u, rand(n, n))


def of_spectrum(sigma: Tensor, m: int, n: int) -> tuple[Tensor, Tensor]:
    """Factors, hidden by a mixing of the columns, of a product with these singular values."""
    r = len(sigma)
    left, right = torch.linalg.qr(rand(m, r)).Q, torch.linalg.qr(rand(n, r, seed=1)).Q
    mixing = rand(r, r, seed=2)
    return left * sigma @ mixing, torch.linalg.solve(mixing, right.T)


@pytest.mark.parametrize("exponent", range(-14, 1))
def test_the_proof_of_full_rank_never_accepts_what_the_singular_values_refuse(exponent):
    u, v = of_spectrum(torch.logspace(0, exponent, 9, dtype=torch.float64), 30, 20)
    rows = torch.arange(30)
    proven = surely_full_rank(Pivots(u[:9] @ v, coefficients_of(u, rows), rows.int()))
    assert proven == (exponent >= -4)  # by the floor, 3e-6 of the norm, and what the first nine rows lose


def test_the_proof_of_full_rank_needs_finite_numbers():
    rows = rand(3, 5)
    perm = torch.arange(6, dtype=torch.int32)
    assert surely_full_rank(Pivots(rows, rand(3, 3), perm))
    for bad in (torch.nan, torch.inf):
        assert not surely_full_rank(Pivots(rows, torch.full((3, 3), bad, dtype=torch.float64), perm))
        assert not surely_full_rank(Pivots(rows * bad, rand(3, 3), perm))


@pytest.mark.parametrize(("exponent", "kept"), [(-9, 9), (-11, 8)])
def test_where_the_proof_fails_the_rank_is_still_found(exponent, kept):
    sigma = torch.ones(9, dtype=torch.float64)
    sigma[8] = 10.0**exponent
    pivots = pivot(*of_spectrum(sigma, 30, 20))
    assert len(pivots.pivot_rows) == kept
    assert pivots.coefficients.abs().max() <= LARGEST_COEFFICIENT + 1e-9


def test_good_factors_are_not_screened_twice(monkeypatch):
    """What float32 chooses is kept: the slow way in float64 is for the others."""
    monkeypatch.setattr(component.pivot.pivoting, "_full_rank", None)
    check(rand(60, 20), rand(20, 50, seed=1))
    names, factors = ["a", "b"], [(rand(60, 20, seed=i), rand(20, 50, seed=9 + i)) for i in range(2)]
    assert torch.equal(*(p.perm for p in pivot_together(factors, names)))


@pytest.mark.parametrize("scale", [1e-60, 1e60])
def test_numbers_outside_the_range_of_float32(scale):
    check(scale * rand(20, 6), rand(6, 15, seed=1))


def test_rows_that_only_float64_tells_apart():
    """A column that is another one plus 1e-9 of a third: float32 sees two equal ones."""
    u = rand(30, 5)
    u[:, 4] = u[:, 3] + 1e-9 * u[:, 4]
    v = rand(5, 20, seed=1)
    v[3], v[4] = 1e5 * v[3], 1e5 * v[4]
    assert len(check(u, v).pivot_rows) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_factors_are_pivoted_in_float64(dtype):
    pivots = check(rand(20, 6).to(dtype), rand(6, 15, seed=1).to(dtype))
    assert pivots.pivot_rows.dtype == pivots.coefficients.dtype == torch.float64


def test_square_rank_needs_no_coefficients():
    pivots = check(rand(5, 5), rand(5, 8, seed=1))
    assert pivots.coefficients.numel() == 0
    torch.testing.assert_close(pivots.pivot_rows, rand(5, 5) @ rand(5, 8, seed=1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("factor", [0, 1])
def test_numbers_that_are_not_finite_are_an_error_that_names_the_module(factor, value):
    factors = [rand(6, 3), rand(3, 5)]
    factors[factor][1, 2] = value
    with pytest.raises(RunError, match="layer 3"):
        pivot(*factors, "layer 3")


def test_same_input_gives_the_same_pivots():
    first, second = (pivot(rand(30, 8), rand(8, 20, seed=1)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_layer_made_of_pivots_is_the_product():
    u, v, bias, x = rand(20, 6), rand(6, 15, seed=1), rand(20, seed=2), rand(4, 15, seed=3)
    layer = PIFALinear.from_pivots(*pivot(u, v), bias, torch.float64)
    assert relative(layer(x), x @ (u @ v).T + bias) < 1e-12


# ---------------------------------------------------------------- several matrices, one perm


@settings(max_examples=60)
@given(st.integers(2, 40), st.integers(1, 3), st.integers(0, 10**6), st.data())
def test_pivots_chosen_together_reproduce_every_product(m, count, seed, data):
    """At ranks of their own, whether or not there are good pivots in common."""
    ranks = [data.draw(st.integers(1, m)) for _ in range(count)]
    factors = [(rand(m, r, seed=seed + i), rand(r, m, seed=seed + 10 + i)) for i, r in enumerate(ranks)]
    for (u, v), pivots in zip(factors, pivot_together(factors, [str(i) for i in range(count)]), strict=True):
        assert pivots.pivot_rows.shape == (u.shape[1], m)
        assert relative(assembled(pivots), u @ v) < 1e-10


@pytest.mark.parametrize("ranks", [(20, 20), (12, 31), (31, 12), (12, 25, 40), (20, 60), (60, 60), (5,)])
def test_pivots_chosen_together_share_one_order(ranks):
    """[pivots of all | of the higher ranks only | others], each part sorted."""
    m = 60
    factors = [(rand(m, r, seed=i), rand(r, 70, seed=10 + i)) for i, r in enumerate(ranks)]
    found = pivot_together(factors, [str(i) for i in range(len(ranks))])
    order = found[0].perm.argsort()
    for (u, v), rank, pivots in zip(factors, ranks, found, strict=True):
        assert torch.equal(pivots.perm, found[0].perm)
        torch.testing.assert_close(pivots.pivot_rows, (u @ v)[order[:rank]])
        assert pivots.coefficients.numel() == 0 or pivots.coefficients.abs().max() <= LARGEST_SHARED_COEFFICIENT
    edges = sorted({0, *ranks, m})
    for start, stop in pairwise(edges):
        assert torch.equal(order[start:stop], order[start:stop].sort().values)


@pytest.mark.parametrize("ranks", [(20, 20), (12, 31)])
def test_no_swap_is_left_that_would_raise_the_product_of_the_determinants(ranks):
    m = 60
    factors = [(rand(m, r, seed=i), rand(r, 70, seed=10 + i)) for i, r in enumerate(ranks)]
    order = pivot_together(factors, ["a", "b"])[0].perm.argsort()

    def volume(rows: Tensor) -> float:
        return sum(torch.linalg.slogdet(u[rows[: u.shape[1]]]).logabsdet.item() for u, _ in factors)

    best = volume(order)
    for low in range(max(ranks)):
        for high in range(low + 1, m):
            swapped = order.clone()
            swapped[[low, high]] = order[[high, low]]
            assert volume(swapped) <= best + torch.tensor(LARGEST_COEFFICIENT).log().item() + 1e-9


@pytest.mark.parametrize(("low", "high"), [(1, 3), (2, 9), (0, 11), (6, 10)])  # pivots, one of each, others
def test_an_exchange_of_rows_is_that_of_the_coefficients(low, high):
    u, rows = rand(12, 5), torch.arange(12)
    coefficients = coefficients_of(u, rows)
    exchange(coefficients, low, high)
    rows[[low, high]] = rows[[high, low]]
    torch.testing.assert_close(coefficients, coefficients_of(u, rows))


def test_a_row_that_is_good_for_all_is_chosen_before_the_best_of_each():
    columns = torch.tensor([[3.0, 0.1], [2.0, 2.0], [0.1, 3.0], [1.0, 1.0]], dtype=torch.float64)
    assert common_rows([columns[:, :1], columns[:, 1:]])[0] == 1


def test_matrices_without_pivots_in_common_get_their_own(caplog):
    u = rand(40, 8)
    first, second = (torch.cat([u, 0 * u]), rand(8, 9, seed=1)), (torch.cat([0 * u, u]), rand(8, 9, seed=2))
    found = pivot_together([first, second], ["gate", "up"])
    assert "gate and up: no good pivots in common" in caplog.text
    for (u, v), pivots in zip((first, second), found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(pivots, pivot(u, v), strict=True))


def test_a_matrix_that_is_not_finite_is_named():
    bad = rand(6, 3)
    bad[2, 1] = torch.nan
    with pytest.raises(RunError, match="up"):
        pivot_together([(rand(6, 3), rand(3, 5)), (bad, rand(3, 5))], ["gate", "up"])


def test_together_alone_is_pivot():
    u, v = rand(30, 8), rand(8, 20, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(pivot_together([(u, v)], ["a"])[0], pivot(u, v), strict=True))
