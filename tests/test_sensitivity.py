"""component/sensitivity.py and component/profile.py: against whole-model backward passes, and term by term."""

import pytest
import torch

from component.moments import add_product
from component.profile import Profiling, make_profile, profile_layers
from component.sensitivity import angular_influence, loss_curve, outlier_share, output_weighting
from component.whitening import whitened_factors
from tests import tiny
from utils.errors import UsageError
from utils.layers import describe_layers

WINDOWS = tiny.token_windows(3, 24)
CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
def test_the_curve_is_the_error_of_whitened_truncation_seen_along_the_gradients(shape):
    weight, inputs, gradients = (
        tiny.rand(*shape, seed=1),
        tiny.rand(50, shape[1], seed=2),
        tiny.rand(50, shape[0], seed=3),
    )
    gram = inputs.T @ inputs
    curve = loss_curve(weight, gram, inputs, gradients, None)
    for rank in range(1, min(shape)):
        u, v = whitened_factors(weight, gram, rank)
        errors = ((weight - u @ v) @ inputs.T * gradients.T).sum(0)
        assert curve[rank].item() == pytest.approx(errors.square().mean().item() / 2, rel=1e-4)
    assert curve[-1] == 0


def test_weighted_truncation_loses_less_along_the_gradients_that_define_the_weighting():
    """With independent inputs and gradients the Kronecker form holds, and two-sided truncation is the best one."""
    weight, inputs = tiny.rand(12, 10, seed=1), tiny.rand(4000, 10, seed=2)
    gradients = tiny.rand(4000, 12, seed=3) * torch.logspace(0, 2, 12, dtype=torch.float64)
    gram, output_gram = inputs.T @ inputs, gradients.T @ gradients
    plain = loss_curve(weight, gram, inputs, gradients, None)
    weighted = loss_curve(weight, gram, inputs, gradients, output_weighting(output_gram, 1e-6))
    assert (weighted[2:8] < plain[2:8]).all()


def test_full_shrinkage_is_no_weighting_and_a_silent_module_gets_none():
    identity = torch.eye(4, dtype=torch.float64)
    assert torch.allclose(output_weighting(tiny.gram_of(tiny.rand(4, 9)), 1.0), identity)
    assert torch.equal(output_weighting(torch.zeros(4, 4), 0.3), identity)


@pytest.mark.parametrize("family", ["llama-gqa", "qwen2", "phi3", "opt"])
def test_the_layerwise_backward_pass_is_that_of_the_whole_model(family):
    model = tiny.build(family)
    described = describe_layers(model)
    measured = {}
    for _, layer in profile_layers(model, described, Profiling(WINDOWS, CPU, seed=5)):
        measured.update(layer.linears)
    expected = whole_model_output_grams(model, list(measured), seed=5)
    assert len(measured) == sum(len(layer.linears()) for layer in described)
    for name, sensitivity in measured.items():
        assert tiny.relative(sensitivity.output_gram.double(), expected[name]) < 1e-4
        assert sensitivity.loss_curves[0, 0] > 0


def whole_model_output_grams(model, names, seed):
    """sum_t g_t g_t^T of each linear by one autograd pass per window, with the labels the profile draws."""
    draw = torch.Generator().manual_seed(seed)
    grams: dict[str, torch.Tensor] = {}
    for window in WINDOWS:
        outputs: dict[str, torch.Tensor] = {}

        def keep(name, outputs=outputs):
            def hook(_module, _args, output):
                outputs[name] = output.requires_grad_() if not output.requires_grad else output
                return outputs[name]

            return hook

        handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
        scores = model(window[None], use_cache=False).logits[0].log_softmax(-1)
        for handle in handles:
            handle.remove()
        labels = torch.multinomial(scores.detach().exp(), 1, generator=draw)
        found = torch.autograd.grad(scores.gather(-1, labels).sum(), [outputs[name] for name in names])
        for name, gradient in zip(names, found, strict=True):
            grams[name] = add_product(grams.get(name), gradient, gradient)
    return grams


def test_a_profile_is_reused_by_its_owner_and_refused_to_others(tmp_path):
    model = tiny.build()
    described = describe_layers(model)
    profiling = Profiling(WINDOWS, CPU, 1, (0.3, None))
    first = make_profile(tmp_path / "p", "mine", model, described, profiling)
    bytes_before = {path.name: path.read_bytes() for path in (tmp_path / "p").iterdir()}
    again = make_profile(tmp_path / "p", "mine", model, described, profiling)
    for shrinkage in (0.3, None):
        assert again.curves(shrinkage) == first.curves(shrinkage)
    assert first.curves(0.3) != first.curves(None)
    assert {path.name: path.read_bytes() for path in (tmp_path / "p").iterdir()} == bytes_before
    with pytest.raises(UsageError, match="other flags, another model or other data"):
        make_profile(tmp_path / "p", "other", model, described, profiling)


def test_outliers_are_counted_against_the_mean_of_the_layer():
    weights = [torch.ones(4, 5, dtype=torch.float64), torch.ones(4, 5, dtype=torch.float64)]
    norms = [torch.ones(5, dtype=torch.float64), torch.tensor([1.0, 1.0, 1.0, 1.0, 100.0], dtype=torch.float64)]
    assert outlier_share(weights, norms) == 4 / 40


def test_influence_is_the_angle_over_pi():
    before = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    after = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    assert angular_influence(before, after) == pytest.approx(0.25)
