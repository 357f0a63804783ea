"""component/solve/linalg.py: what can't be factored is damped more, aloud; what is not finite is an error."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from component.solve.linalg import (
    balance,
    damped_cholesky,
    pack_triangle,
    raised_diagonal,
    solve_right,
    unpack_triangle,
)
from tests.tiny import gram_of, rand
from utils.errors import RunError

RAISED = "layer 3: Gram matrix not positive definite, damping raised to"


def identity(n: int) -> torch.Tensor:
    return torch.eye(n, dtype=torch.float64)


def factored(gram: torch.Tensor, damping: float) -> float:
    """mu, after checking that the factor is a Cholesky factor of gram + mu I."""
    factor, mu = damped_cholesky(gram, damping, "layer 3")
    torch.testing.assert_close(factor @ factor.T, gram + mu * identity(len(gram)), rtol=1e-9, atol=1e-12)
    assert torch.equal(factor, factor.tril())
    return mu


@given(st.integers(1, 10), st.integers(0, 10**6), st.sampled_from([0.0, 1e-6, 1e-3]))
def test_a_good_matrix_gets_the_damping_asked(n, seed, damping):
    gram = gram_of(rand(n, 5 * n, seed=seed))
    assert factored(gram, damping) == pytest.approx(damping * gram.diagonal().mean().item(), rel=1e-12)


def test_a_good_matrix_is_not_logged(caplog):
    factored(gram_of(rand(6, 30)), 0.0)
    assert caplog.messages == []


def singular(n: int = 6) -> torch.Tensor:
    x = rand(n, 30)
    x[2] = x[0] - x[1]
    return gram_of(x) - 1e-13 * identity(n)  # rounding made certain


def indefinite(n: int = 6) -> torch.Tensor:
    gram = gram_of(rand(n, 30))
    return gram - (torch.linalg.eigvalsh(gram)[0] + 0.1 * gram.diagonal().mean()) * identity(n)


BAD = {
    "singular": singular(),
    "dead channels": torch.diag(torch.tensor([1.0, 0.0, 2.0, 0.0], dtype=torch.float64)),
    "1 sample": gram_of(torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)) - 1e-14 * identity(3),
    "indefinite": indefinite(),
    "very indefinite": torch.diag(torch.tensor([3.0, -2.0], dtype=torch.float64)),
    "tiny": 1e-200 * torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64)),
}


@pytest.mark.parametrize("trouble", BAD)
def test_a_bad_matrix_is_damped_until_it_can_be_factored_and_logged(trouble, caplog):
    gram = BAD[trouble]
    assert factored(gram, 0.0) > 0
    assert caplog.messages and all(message.startswith(RAISED) for message in caplog.messages)


def test_damping_is_relative():
    """The same matrix in other units is damped by the same share."""
    mu, scaled = (factored(scale * BAD["dead channels"], 0.0) for scale in (1.0, 1e6))
    assert scaled == pytest.approx(1e6 * mu)


def test_damping_is_raised_no_further_than_needed():
    gram = BAD["very indefinite"]  # needs mu > 2, four times its mean diagonal
    assert 2 < factored(gram, 1e-3) <= 20


def test_zero_is_damped_by_one():
    factor, mu = damped_cholesky(torch.zeros(4, 4, dtype=torch.float64), 1e-6, "layer 3")
    assert mu == 1.0 and torch.equal(factor, identity(4))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (2, 1)])
def test_numbers_that_are_not_finite_are_an_error_that_names_the_module(value, place):
    gram = gram_of(rand(4, 20))
    gram[place] = value
    with pytest.raises(RunError, match="layer 3"):
        damped_cholesky(gram, 1e-6, "layer 3")


def test_a_raised_diagonal_comes_back_bit_by_bit_also_after_an_error():
    matrix = rand(3, 3)
    before = matrix.clone()
    with pytest.raises(KeyError), raised_diagonal(matrix, 0.1):
        assert torch.equal(matrix, before + 0.1 * identity(3))
        raise KeyError
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("tokens", [3, 20])  # with 3 the matrix is singular, and damping has to be raised
def test_a_factored_matrix_is_left_as_it_was(tokens):
    gram = gram_of(rand(6, tokens))
    before = gram.clone()
    damped_cholesky(gram, 0.0, "layer 3")
    assert torch.equal(gram, before)


def test_solve_right_is_the_product_with_the_inverse():
    gram, matrix = gram_of(rand(5, 20)), rand(3, 5)
    solved = solve_right(matrix, torch.linalg.cholesky(gram))
    torch.testing.assert_close(solved @ gram, matrix, rtol=1e-9, atol=1e-9)


def test_balance_keeps_the_product():
    u, v = rand(5, 3) * torch.tensor([1e-6, 1.0, 1e6], dtype=torch.float64), rand(3, 4, seed=1)
    left, right = balance(u, v)
    torch.testing.assert_close(left @ right, u @ v, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1), rtol=1e-12, atol=0)


def test_balance_survives_directions_that_are_absent():
    u, v = rand(5, 3), rand(3, 4, seed=1)
    u[:, 0], v[1] = 0, 0
    left, right = balance(u, v)
    torch.testing.assert_close(left @ right, u @ v, rtol=1e-12, atol=1e-12)


@given(st.integers(1, 70), st.integers(0, 10**6), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_a_packed_matrix_is_its_lower_triangle_and_comes_back_whole(n, seed, dtype):
    matrix = rand(n, n, seed=seed).to(dtype)
    symmetric = matrix + matrix.T
    triangle = pack_triangle(symmetric)
    assert triangle.dtype == dtype
    assert triangle.tolist() == [symmetric[i, j].item() for i in range(n) for j in range(i + 1)]
    assert torch.equal(unpack_triangle(triangle), symmetric)


@pytest.mark.parametrize("n", [1000, 4096, 11008, 28672])
def test_the_size_of_a_packed_matrix_is_found_from_its_numbers(n):
    """Without the memory of the large ones: zeros that are stored once."""
    with torch.device("meta"):
        assert unpack_triangle(torch.empty(n * (n + 1) // 2)).shape == (n, n)
