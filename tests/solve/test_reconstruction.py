"""component/solve/reconstruction.py: the exact solver is optimal, and what alternating steps converge to."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from component.solve import reconstruction
from component.solve.reconstruction import (
    EXACT_DAMPING,
    PAPER_RIDGE,
    alternating_factors,
    exact_factors,
    target_moment,
    update_u,
    update_v,
)
from component.solve.whitening import plain_factors, whitened_factors
from tests.tiny import gram_of, rand, relative


class Problem(NamedTuple):
    """A module with its inputs in both flows, and what the solvers are given of them."""

    weight: Tensor
    x_dense: Tensor
    x_low_rank: Tensor
    mix_ratio: float
    rank: int

    @property
    def gram(self) -> Tensor:
        return gram_of(self.x_low_rank)

    @property
    def cross(self) -> Tensor:
        return self.x_dense @ self.x_low_rank.T

    @property
    def target(self) -> Tensor:
        return target_moment(self.weight, self.gram, self.cross, mix_ratio=self.mix_ratio)

    @property
    def outputs(self) -> Tensor:
        """Y_t = lambda W X_o + (1 - lambda) W X_u."""
        return self.mix_ratio * self.weight @ self.x_dense + (1 - self.mix_ratio) * self.weight @ self.x_low_rank

    @property
    def mu(self) -> float:
        return EXACT_DAMPING * self.gram.diagonal().mean().item()

    def objective(self, u: Tensor, v: Tensor, mu: float | None = None) -> float:
        """||Y_t - U V X_u||^2 + mu ||W - U V||^2."""
        error = (self.outputs - u @ v @ self.x_low_rank).square().sum()
        return (error + (self.mu if mu is None else mu) * (self.weight - u @ v).square().sum()).item()

    def exact(self) -> tuple[Tensor, Tensor]:
        return exact_factors(self.weight, self.target, self.gram, rank=self.rank)


def problem(m: int = 7, n: int = 6, rank: int = 3, mix_ratio: float = 0.25, seed: int = 0, tokens: int = 20) -> Problem:
    x_dense = rand(n, n, seed=seed) @ rand(n, tokens, seed=seed + 1)
    x_low_rank = x_dense + 0.3 * rand(n, tokens, seed=seed + 2)
    return Problem(rand(m, n, seed=seed + 3), x_dense, x_low_rank, mix_ratio, rank)


@st.composite
def problems(draw) -> Problem:
    m, n = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    rank = draw(st.integers(1, min(m, n)))
    mix_ratio = draw(st.sampled_from([0.0, 0.25, 0.5, 1.0]))
    # fewer tokens than rows make a singular Gram matrix
    return problem(m, n, rank, mix_ratio, draw(st.integers(0, 10**6)), tokens=draw(st.integers(1, 20)))


@given(problems())
def test_target_moment_is_the_target_times_the_inputs(p):
    torch.testing.assert_close(p.target, p.outputs @ p.x_low_rank.T, rtol=1e-9, atol=1e-9)


@given(problems(), st.integers(0, 10**6), st.integers(0, 8))
def test_no_perturbation_of_the_exact_factors_lowers_the_objective(p, seed, exponent):
    u, v = p.exact()
    least, scale = p.objective(u, v), 10.0**-exponent
    slack = 1e-9 * (p.outputs.square().sum().item() + p.mu * p.weight.square().sum().item())
    for trial in range(10):
        du, dv = rand(*u.shape, seed=seed + trial), rand(*v.shape, seed=seed + trial + 100)
        for change_u, change_v in [(du, dv), (du, 0 * dv), (0 * du, dv)]:
            assert p.objective(u + scale * change_u, v + scale * change_v) >= least - slack


@given(problems(), st.integers(0, 10**6))
def test_no_other_matrix_of_the_rank_is_better_than_the_exact_one(p, seed):
    """Also far away from it: random starts, improved by one sweep of best U, best V."""
    least = p.objective(*p.exact())
    moment, gram = p.target + p.mu * p.weight, p.gram + p.mu * torch.eye(len(p.gram), dtype=torch.float64)
    u = update_u(moment, gram, rand(p.rank, p.weight.shape[1], seed=seed))
    v = update_v(moment, gram, u)
    assert least <= p.objective(u, v) * (1 + 1e-6) + 1e-9


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("m", "n", "rank"), [(7, 6, 3), (6, 7, 2), (9, 5, 1)])
@pytest.mark.parametrize("mix_ratio", [0.0, 0.25])
def test_exact_is_the_limit_of_alternating_steps(m, n, rank, mix_ratio, seed):
    """With B + mu W and G + mu I in both steps, from plain SVD factors of W."""
    p = problem(m, n, rank, mix_ratio, seed)
    moment, gram = p.target + p.mu * p.weight, p.gram + p.mu * torch.eye(len(p.gram), dtype=torch.float64)
    u, v = plain_factors(p.weight, rank)
    for _ in range(3000):
        before = u @ v
        u = update_u(moment, gram, v)
        v = update_v(moment, gram, u)
        if relative(u @ v, before) < 1e-13:
            break
    exact_u, exact_v = p.exact()
    assert relative(exact_u @ exact_v, u @ v) < 1e-8


@given(problems())
def test_at_lambda_0_and_full_rank_the_weight_comes_back(p):
    p = p._replace(mix_ratio=0.0, rank=min(p.weight.shape))
    u, v = p.exact()
    assert relative(u @ v, p.weight) < 1e-6


def test_at_lambda_0_the_cross_moment_is_not_read():
    p = problem(mix_ratio=0.0)
    without = target_moment(p.weight, p.gram, None, mix_ratio=0.0)
    torch.testing.assert_close(without, p.target, rtol=0, atol=0)
    torch.testing.assert_close(without, p.weight @ p.gram, rtol=1e-12, atol=1e-12)


def test_exact_without_drift_is_whitening():
    """Both flows alike: the target is W X, and damping apart the problem is SVD-LLM's."""
    p = problem()._replace(mix_ratio=0.0)
    u, v = exact_factors(p.weight, p.target, p.gram, rank=p.rank, damping=1e-9)
    white_u, white_v = whitened_factors(p.weight, p.gram, p.rank)
    assert relative(u @ v, white_u @ white_v) < 1e-4


@given(problems(), st.integers(0, 10**6))
def test_each_step_is_the_best_one_for_the_other_factor(p, seed):
    p = p._replace(x_low_rank=torch.cat([p.x_low_rank, rand(len(p.x_low_rank), 12, seed=7)], dim=1),
                   x_dense=torch.cat([p.x_dense, rand(len(p.x_dense), 12, seed=8)], dim=1))  # fmt: skip
    start_u, start_v = plain_factors(p.weight, p.rank)
    best_u = update_u(p.target, p.gram, start_v)
    best_v = update_v(p.target, p.gram, start_u)
    for scale in (1e-4, 1e-1):
        other_u = best_u + scale * rand(*best_u.shape, seed=seed)
        other_v = best_v + scale * rand(*best_v.shape, seed=seed)
        assert p.objective(best_u, start_v, mu=0) <= p.objective(other_u, start_v, mu=0) + 1e-9
        assert p.objective(start_u, best_v, mu=0) <= p.objective(start_u, other_v, mu=0) + 1e-9


@pytest.mark.parametrize("step", [1, 2, -1])
def test_steps_are_the_papers(step):
    """Algorithm 3 and equation 9, written out with inverses: U without a ridge, V with alpha absolute on both sides."""
    p = problem()
    u, v = start = plain_factors(p.weight, p.rank)
    if step in (1, 2):
        u = p.outputs @ p.x_low_rank.T @ v.T @ torch.linalg.inv(v @ p.gram @ v.T)
    if step in (2, -1):
        right = torch.linalg.inv(p.gram + PAPER_RIDGE * torch.eye(len(p.gram), dtype=torch.float64))
        v = torch.linalg.inv(u.T @ u) @ u.T @ (p.outputs @ p.x_low_rank.T + PAPER_RIDGE * p.weight) @ right
    found_u, found_v = alternating_factors(p.weight, p.target, p.gram, start=start, step=step)
    assert relative(found_u @ found_v, u @ v) < 1e-10
    if step == 1:  # v is only scaled
        found_rows, start_rows = (torch.nn.functional.normalize(rows) for rows in (found_v, start[1]))
        assert relative(found_rows, start_rows) < 1e-12


def test_a_sweep_lowers_the_error_and_exact_lowers_it_most():
    p = problem()
    start = whitened_factors(p.weight, gram_of(p.x_dense), p.rank)
    errors = [p.objective(*start)]
    errors += [p.objective(*alternating_factors(p.weight, p.target, p.gram, start=start, step=step)) for step in (1, 2)]
    errors.append(p.objective(*p.exact()))
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("solve", [
    lambda p: p.exact(),
    lambda p: alternating_factors(p.weight, p.target, p.gram, start=plain_factors(p.weight, p.rank), step=2),
])  # fmt: skip
def test_factors_are_balanced(solve):
    u, v = solve(problem())
    torch.testing.assert_close(u.norm(dim=0), v.norm(dim=1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("step", [1, 2, -1])
def test_fewer_tokens_than_rows_give_finite_factors(step, tokens):
    p = problem(tokens=tokens)
    start = whitened_factors(p.weight, gram_of(p.x_dense), p.rank)
    u, v = alternating_factors(p.weight, p.target, p.gram, start=start, step=step)
    assert torch.isfinite(u).all() and torch.isfinite(v).all()


def test_no_data_at_all_gives_the_plain_svd():
    """An input that is always zero says nothing about which outputs matter."""
    weight, nothing = rand(7, 6), torch.zeros(6, 6, dtype=torch.float64)
    u, v = exact_factors(weight, weight @ nothing, nothing, rank=3)
    plain_u, plain_v = plain_factors(weight, 3)
    assert relative(u @ v, plain_u @ plain_v) < 1e-9


def test_a_weighting_moves_the_optimum_to_the_weighted_error():
    """No perturbation of the factors lowers ||L_g^T (Y_t - U V X_u)||^2 + mu ||L_g^T (W - U V)||^2."""
    weight, x, rank = rand(8, 6, seed=1), rand(6, 40, seed=2), 3
    weighting = torch.linalg.cholesky(gram_of(rand(8, 30, seed=3)))
    drift = rand(8, 40, seed=4)
    gram, mu = gram_of(x), EXACT_DAMPING * gram_of(x).diagonal().mean()
    target = target_moment(weight, gram, None, mix_ratio=0.0, drift=drift @ x.T, drift_ratio=0.5)

    def objective(u: Tensor, v: Tensor) -> float:
        error = weighting.T @ (weight @ x + 0.5 * drift - u @ v @ x)
        return (error.square().sum() + mu * (weighting.T @ (weight - u @ v)).square().sum()).item()

    u, v = exact_factors(weight, target, gram, rank=rank, weighting=weighting)
    least = objective(u, v)
    unweighted = exact_factors(weight, target, gram, rank=rank)
    assert least < objective(*unweighted)
    for seed in range(30):
        step = 10.0 ** -(seed % 4 + 1)
        assert objective(u + step * rand(8, rank, seed=seed), v + step * rand(rank, 6, seed=seed + 99)) >= least


def test_equal_ratios_pull_stream_and_module_together_towards_the_dense_flow():
    """rho = lambda: h_u + W' x_u is fitted to lambda (h_o + W x_o) + (1 - lambda) (h_u + W x_u)."""
    weight, x_dense, x, share = rand(5, 7, seed=1), rand(7, 30, seed=2), rand(7, 30, seed=3), 0.4
    h_dense, h = rand(5, 30, seed=4), rand(5, 30, seed=5)
    wanted = share * (h_dense + weight @ x_dense) + (1 - share) * (h + weight @ x) - h
    moment = target_moment(
        weight, gram_of(x), x_dense @ x.T, mix_ratio=share, drift=(h_dense - h) @ x.T, drift_ratio=share
    )
    assert relative(moment, wanted @ x.T) < 1e-12


@pytest.mark.parametrize("rows", [1, 4, 7, 100])
@pytest.mark.parametrize("mix_ratio", [0.0, 0.3, 1.0])
def test_the_target_is_the_same_however_many_rows_are_mixed_at_once(rows, mix_ratio, monkeypatch):
    monkeypatch.setattr(reconstruction, "ROWS", rows)
    weight, gram, cross, drift = rand(5, 7), gram_of(rand(7, 20, seed=1)), rand(7, 7, seed=2), rand(5, 7, seed=3)
    before = [tensor.clone() for tensor in (weight, gram, cross, drift)]
    found = target_moment(weight.float(), gram, cross, mix_ratio=mix_ratio, drift=drift, drift_ratio=0.5)
    expected = weight.float().double() @ (mix_ratio * cross + (1 - mix_ratio) * gram) + 0.5 * drift
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    assert all(torch.equal(*pair) for pair in zip((weight, gram, cross, drift), before, strict=True))
