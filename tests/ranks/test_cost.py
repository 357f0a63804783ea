"""component/ranks/cost.py: the formulas count what the layers store, and ranks never cost more than is paid for."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from component.format.linear import LowRankLinear, PIFALinear
from component.ranks.cost import LOW_RANK, PIVOTED

FORMATS = [(PIVOTED, PIFALinear), (LOW_RANK, LowRankLinear)]
SIZE = st.integers(1, 200)


@pytest.mark.parametrize(("storage", "kind"), FORMATS)
@given(m=SIZE, n=SIZE, data=st.data())
def test_formula_counts_the_stored_numbers(storage, kind, m, n, data):
    rank = data.draw(st.integers(1, min(m, n)))
    layer = kind(n, m, rank, bias=True, device="meta", dtype=torch.float16)
    stored = sum(tensor.numel() for name, tensor in layer.state_dict().items() if name != "bias")
    assert storage.stored(rank, m, n) == stored


@pytest.mark.parametrize(("storage", "_"), FORMATS)
def test_a_dense_module_stores_its_matrix(storage, _):
    assert storage.stored(None, 7, 5) == 35


@given(m=SIZE, n=SIZE, data=st.data())
def test_pivoted_rank_is_the_formulas(m, n, data):
    """r = floor(((m+n) - sqrt((m+n)^2 - 4 (rho m n - m))) / 2), the smaller root of c(r) = rho m n."""
    assume(min(m, n) > 1 and m < m * n - 1)
    numbers = data.draw(st.integers(m, m * n - 1))
    exact = ((m + n) - math.sqrt((m + n) ** 2 - 4 * (numbers - m))) / 2
    # the root of a whole number may come out a rounding error below it
    formula = {math.floor(exact - 1e-9), math.floor(exact + 1e-9)}
    assert PIVOTED.rank_for(numbers, m, n) in formula


@given(m=SIZE, n=SIZE, density=st.floats(0.01, 0.999))
def test_low_rank_rank_is_the_formulas(m, n, density):
    """r = floor(rho m n / (m + n))."""
    numbers = density * m * n
    assert LOW_RANK.rank_for(numbers, m, n) == min(math.floor(numbers / (m + n)), min(m, n) - 1)


@pytest.mark.parametrize(("storage", "_"), FORMATS)
@given(m=SIZE, n=SIZE, density=st.floats(0.01, 0.999))
def test_rank_is_the_largest_that_is_paid_for(storage, _, m, n, density):
    numbers = density * m * n
    rank = storage.rank_for(numbers, m, n)
    assert 0 <= rank < min(m, n) or rank == 0
    assert rank == 0 or storage.numbers(rank, m, n) <= numbers
    assert rank + 1 >= min(m, n) or storage.numbers(rank + 1, m, n) > numbers


@pytest.mark.parametrize(("storage", "_"), FORMATS)
@pytest.mark.parametrize("density", [1.0, 1.5])
def test_what_pays_for_the_matrix_keeps_it(storage, _, density):
    assert storage.rank_for(density * 35, 7, 5) is None


def test_pivoting_pays_for_a_larger_rank():
    """The paper's point: at half the numbers of a square matrix, 0.29 of its rank instead of a quarter."""
    assert LOW_RANK.rank_for(0.5 * 1000 * 1000, 1000, 1000) == 250
    assert PIVOTED.rank_for(0.5 * 1000 * 1000, 1000, 1000) == 292
