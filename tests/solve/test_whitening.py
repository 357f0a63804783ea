"""component/solve/whitening.py: the truncations are the best ones, with and without data."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from component.solve.whitening import plain_factors, scaled_factors, truncate, whitened_factors
from tests.tiny import gram_of, rand, relative
from utils.errors import RunError

SIZES = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(0, 10**6))


def truncated_svd(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    u, sigma, v = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * sigma[:rank] @ v[:rank]


@given(SIZES, st.data())
def test_truncate_is_the_truncated_svd(sizes, data):
    m, n, seed = sizes
    rank = data.draw(st.integers(1, min(m, n)))
    target = rand(m, n, seed=seed)
    u, v = truncate(target, rank)
    assert u.shape == (m, rank) and v.shape == (rank, n)
    least = torch.linalg.svdvals(target)[rank:].norm()
    assert (target - u @ v).norm() <= least * (1 + 1e-9) + 1e-10 * target.norm()


@pytest.mark.parametrize("shape", [(8, 5), (5, 8)])
def test_truncate_keeps_a_matrix_of_lower_rank(shape):
    target = rand(shape[0], 2, seed=1) @ rand(2, shape[1], seed=2)
    u, v = truncate(target, 4)
    assert relative(u @ v, target) < 1e-12


@given(SIZES, st.data())
def test_whitened_factors_lose_the_least_output(sizes, data):
    """Eckart-Young on W X: no rank-r W' comes closer than the tail of its singular values."""
    m, n, seed = sizes
    rank = data.draw(st.integers(1, min(m, n)))
    weight, x = rand(m, n, seed=seed), rand(n, 3 * n, seed=seed + 1)
    u, v = whitened_factors(weight, gram_of(x), rank)
    least = torch.linalg.svdvals(weight @ x)[rank:].norm()
    lost = (weight @ x - u @ v @ x).norm()
    # the damping of 1e-6 moves the result by less than that share of the whole
    assert least * (1 - 1e-9) <= lost + 1e-9 and lost <= least + 1e-5 * (weight @ x).norm()


def test_white_data_gives_the_plain_svd():
    weight = rand(8, 6)
    u, v = whitened_factors(weight, 5.0 * torch.eye(6, dtype=torch.float64), 3)
    torch.testing.assert_close(u @ v, truncated_svd(weight, 3), rtol=1e-9, atol=1e-9)


def test_plain_factors_are_the_truncated_svd():
    weight = rand(8, 6)
    u, v = plain_factors(weight.float(), 3)
    assert u.dtype == v.dtype == torch.float64
    torch.testing.assert_close(u @ v, truncated_svd(weight.float().double(), 3), rtol=1e-9, atol=1e-9)


def gram_with(trouble: str) -> torch.Tensor:
    x = rand(6, 30)
    if trouble == "dead channels":
        x[[1, 4]] = 0
    elif trouble == "1 sample":
        x = x[:, :1]
    elif trouble == "all zero":
        x = 0 * x
    gram = gram_of(x)
    return gram - 0.05 * torch.eye(6, dtype=torch.float64) * gram.diagonal().mean() if trouble == "indefinite" else gram


@pytest.mark.parametrize("trouble", ["dead channels", "1 sample", "all zero", "indefinite"])
def test_bad_moments_give_finite_factors(trouble):
    u, v = whitened_factors(rand(8, 6), gram_with(trouble), 3)
    assert torch.isfinite(u).all() and torch.isfinite(v).all()


def test_one_sample_is_kept_exactly():
    """With one token, rank 1 is enough for the outputs that were seen."""
    weight, x = rand(8, 6), rand(6, 1, seed=1)
    u, v = whitened_factors(weight, gram_of(x), 1)
    assert relative(u @ v @ x, weight @ x) < 1e-4


@pytest.mark.parametrize("factors", [plain_factors, lambda w, r: whitened_factors(w, gram_of(rand(6, 30)), r)])
def test_factors_are_balanced(factors):
    u, v = factors(rand(8, 6), 3)
    torch.testing.assert_close(u.norm(dim=0), v.norm(dim=1), rtol=1e-9, atol=1e-9)


@given(SIZES, st.data())
def test_scaled_factors_are_asvd_by_hand(sizes, data):
    """W' = [W S]_r S^-1 with S = diag(mean |x|)^alpha; sums in place of means change nothing."""
    m, n, seed = sizes
    rank, alpha = data.draw(st.integers(1, min(m, n))), data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    weight, x = rand(m, n, seed=seed), rand(n, 3 * n, seed=seed + 1)
    scale = x.abs().mean(1) ** alpha
    expected = truncated_svd(weight * scale, rank) / scale
    u, v = scaled_factors(weight, x.abs().sum(1), rank, alpha=alpha)
    assert u.shape == (m, rank) and v.shape == (rank, n) and u.dtype == v.dtype == torch.float64
    torch.testing.assert_close(u @ v, expected, rtol=1e-6, atol=1e-6)


def test_scaled_factors_use_the_square_root_unless_told_otherwise():
    weight, magnitude = rand(8, 6), torch.arange(1.0, 7.0, dtype=torch.float64)
    u, v = scaled_factors(weight, magnitude, 3)
    torch.testing.assert_close(u @ v, truncated_svd(weight * magnitude.sqrt(), 3) / magnitude.sqrt())


@pytest.mark.parametrize("dead", [[1, 4], [0, 1, 2, 3, 4, 5]])
def test_scaled_factors_survive_dead_channels(dead):
    magnitude = torch.arange(1.0, 7.0, dtype=torch.float64)
    magnitude[dead] = 0
    weight = rand(8, 6)
    u, v = scaled_factors(weight, magnitude, 3)
    assert torch.isfinite(u).all() and torch.isfinite(v).all()
    if len(dead) == 6:
        torch.testing.assert_close(u @ v, truncated_svd(weight, 3), rtol=1e-9, atol=1e-9)


def test_scaled_factors_of_magnitudes_that_are_not_finite_are_refused():
    with pytest.raises(RunError, match=r"a\.q_proj"):
        scaled_factors(rand(3, 2), torch.tensor([1.0, float("inf")]), 1, what="a.q_proj")
