"""component/solve/sensitivity.py: term by term."""

import pytest
import torch

from component.solve.reconstruction import exact_factors
from component.solve.sensitivity import angular_influence, loss_curve, outlier_share, output_moment, output_weighting
from component.solve.whitening import WHITENING_DAMPING
from tests import tiny
from utils.errors import RunError


def unweighted(weight: torch.Tensor) -> torch.Tensor:
    return torch.eye(len(weight), dtype=torch.float64)


@pytest.mark.parametrize("shrinkage", [1.0, 0.1])
@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
def test_the_curve_is_the_error_of_the_solvers_truncation_seen_along_the_gradients(shape, shrinkage):
    weight, inputs, gradients = (
        tiny.rand(*shape, seed=1),
        tiny.rand(50, shape[1], seed=2),
        tiny.rand(50, shape[0], seed=3),
    )
    gram, output_gram = inputs.T @ inputs, gradients.T @ gradients
    curve = loss_curve(weight, gram, inputs=inputs, gradients=gradients, moment=output_moment(output_gram, shrinkage))
    left = None if shrinkage == 1 else output_weighting(output_gram, shrinkage)
    for rank in range(1, min(shape)):
        u, v = exact_factors(weight, weight @ gram, gram, rank=rank, damping=WHITENING_DAMPING, weighting=left)
        errors = ((weight - u @ v) @ inputs.T * gradients.T).sum(0)
        assert curve[rank].item() == pytest.approx(errors.square().mean().item() / 2, rel=1e-4)
    assert curve[-1] == 0


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
def test_moments_that_are_not_finite_are_refused_by_name(shape):
    weight, inputs, gradients = tiny.rand(*shape), tiny.rand(9, shape[1]), tiny.rand(9, shape[0])
    gram, moment = inputs.T @ inputs, unweighted(weight)
    for broken in (gram, moment):
        kept = broken[0, 0].item()
        broken[0, 0] = float("inf")
        with pytest.raises(RunError, match="layer 3"):
            loss_curve(weight, gram, inputs=inputs, gradients=gradients, moment=moment, what="layer 3")
        broken[0, 0] = kept
    assert torch.isfinite(loss_curve(weight, gram, inputs=inputs, gradients=gradients, moment=moment)).all()


def test_weighted_truncation_loses_less_along_the_gradients_that_define_the_weighting():
    """With independent inputs and gradients the Kronecker form holds, and two-sided truncation is the best one."""
    weight, inputs = tiny.rand(12, 10, seed=1), tiny.rand(4000, 10, seed=2)
    gradients = tiny.rand(4000, 12, seed=3) * torch.logspace(0, 2, 12, dtype=torch.float64)
    gram, output_gram = inputs.T @ inputs, gradients.T @ gradients
    plain = loss_curve(weight, gram, inputs=inputs, gradients=gradients, moment=unweighted(weight))
    weighted = loss_curve(weight, gram, inputs=inputs, gradients=gradients, moment=output_moment(output_gram, 1e-6))
    assert (weighted[2:8] < plain[2:8]).all()


def test_full_shrinkage_is_no_weighting_and_a_silent_module_gets_none():
    identity = torch.eye(4, dtype=torch.float64)
    assert torch.allclose(output_weighting(tiny.gram_of(tiny.rand(4, 9)), 1.0), identity)
    assert torch.equal(output_weighting(torch.zeros(4, 4), 0.3), identity)


def test_outliers_are_counted_against_the_mean_of_the_layer():
    weights = [torch.ones(4, 5, dtype=torch.float64), torch.ones(4, 5, dtype=torch.float64)]
    norms = [torch.ones(5, dtype=torch.float64), torch.tensor([1.0, 1.0, 1.0, 1.0, 100.0], dtype=torch.float64)]
    assert outlier_share(weights, norms) == 4 / 40


def test_influence_is_the_angle_over_pi():
    before = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    after = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    assert angular_influence(before, after) == pytest.approx(0.25)
