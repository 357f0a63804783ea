"""flow/refinement.py: tuning the factors of a layer together, on tiny random layers and in float64 algebra."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from component.flow.refinement import (
    Descent,
    draws,
    factors_of,
    refine_layer,
    relative_error,
    schedule_of,
    split_windows,
    step_size,
)
from component.format.linear import LowRankLinear
from component.solve.whitening import plain_factors
from tests import tiny
from utils.errors import RunError
from utils.layers import decoder_layers, layer_inputs, run_layer

WINDOWS, LENGTH = 24, 32
STEPS, BATCH = 40, 4
DENSE = ("self_attn.o_proj", "mlp.gate_proj")  # stay nn.Linear


class Block:
    """A layer with factors, its inputs and outputs; then noise on the factors, which refinement should take away."""

    def __init__(self, family: str = "llama-gqa", dtype: torch.dtype = torch.float32, noise: float = 0.3):
        model = tiny.build(family).to(dtype)
        self.inputs, keywords = layer_inputs(model, tiny.token_windows(WINDOWS, LENGTH))
        self.keywords = keywords[0]
        _, self.layer = decoder_layers(model)[0]
        for name, linear in list(self.layer.named_modules()):
            if isinstance(linear, nn.Linear) and not name.endswith(DENSE):
                u, v = plain_factors(linear.weight, min(linear.weight.shape) // 2)
                self.layer.set_submodule(name, LowRankLinear.from_factors(u, v, linear.bias, dtype))
        self.layer.requires_grad_(False)
        self.targets = run_layer(self.layer, self.inputs, self.keywords)
        for seed, factor in enumerate(factors_of(self.layer).values()):
            size = noise * factor.square().mean().sqrt()
            factor.add_((size * tiny.rand(*factor.shape, seed=seed)).to(dtype))

    def refine(self, **changes) -> tuple[float, float]:
        arguments = {"inputs": self.inputs, "targets": self.targets, "name": "layer"}
        how = {"steps": STEPS, "batch": BATCH}
        for key, value in changes.items():
            (arguments if key in arguments else how)[key] = value
        return refine_layer(self.layer, keywords=self.keywords, descent=Descent(**how), **arguments)

    @torch.no_grad()
    def error(self, windows: Tensor | slice = slice(None)) -> float:
        output = run_layer(self.layer, self.inputs[windows], self.keywords)
        return relative_error(output, self.targets[windows]).item()


def state(layer: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


def changed(layer: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in layer.state_dict().items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("family", ["llama-gqa", "qwen2", "gemma2", "opt"])
def test_improves_noisy_factors_and_reports_what_the_layer_does(family):
    block = Block(family)
    _, judging = split_windows(WINDOWS)
    before = block.error(judging)
    reported = block.refine()
    assert reported == pytest.approx((before, block.error(judging)), rel=1e-5)
    assert reported[1] < 0.7 * reported[0]


def test_improves_windows_that_it_never_saw():
    block = Block()
    before = block.error(slice(-4, None))
    block.refine(inputs=block.inputs[:-4], targets=block.targets[:-4])
    assert block.error(slice(-4, None)) < 0.8 * before


def test_all_but_the_factors_stays_bit_for_bit():
    block = Block("qwen2")  # has biases
    before, modes = state(block.layer), [parameter.requires_grad for parameter in block.layer.parameters()]
    block.refine()
    assert changed(block.layer, before) == set(factors_of(block.layer)) != set()
    assert [parameter.requires_grad for parameter in block.layer.parameters()] == modes
    assert all(parameter.grad is None for parameter in block.layer.parameters())


@pytest.mark.parametrize("learning_rate", [0.2, 30.0])
def test_factors_that_cannot_be_better_stay(learning_rate):
    block = Block(noise=0)
    before = state(block.layer)
    assert block.refine(learning_rate=learning_rate) == (0, 0)
    assert changed(block.layer, before) == set()


@pytest.mark.parametrize("learning_rate", [1e-2, 1.0, 10.0])
@pytest.mark.parametrize("windows", [1, 2, 5])
def test_never_worse(learning_rate, windows):
    block = Block()
    judging = split_windows(windows)[1]
    before = block.error(judging)
    block.refine(
        inputs=block.inputs[:windows], targets=block.targets[:windows], learning_rate=learning_rate, steps=6, batch=3
    )
    assert block.error(judging) <= before


def test_a_seed_settles_the_result():
    first, again, other = Block(), Block(), Block()
    first.refine(seed=1)
    again.refine(seed=1)
    other.refine(seed=2)
    assert changed(again.layer, first.layer.state_dict()) == set()
    assert changed(other.layer, first.layer.state_dict()) == set(factors_of(first.layer))


def test_the_callers_generator_and_gradient_mode_are_left():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    precision = torch.get_float32_matmul_precision()
    block = Block()
    torch.manual_seed(0)
    with torch.no_grad():
        first, last = block.refine()
        assert not torch.is_grad_enabled()
    assert last < first
    assert torch.equal(torch.rand(1), expected)
    assert torch.get_float32_matmul_precision() == precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_layers_are_tuned_in_float32(dtype):
    """Most steps here are shorter than half the distance between neighbouring bfloat16 numbers."""
    block = Block(dtype=dtype)
    _, judging = split_windows(WINDOWS)
    before = block.error(judging)
    first, last = block.refine(targets=block.targets.float(), learning_rate=1e-2)
    assert (first, last) == pytest.approx((before, block.error(judging)), rel=1e-5)
    assert last < 0.9 * first
    assert {tensor.dtype for tensor in block.layer.state_dict().values()} == {dtype}


@pytest.mark.parametrize("changes", [{"steps": 0}, {"dense": True}])
def test_nothing_to_do(changes):
    block = Block()
    if changes.pop("dense", False):
        block.layer = copy.deepcopy(decoder_layers(tiny.build())[1][1])
    before = state(block.layer)
    first, last = block.refine(**changes)
    assert first == last > 0
    assert changed(block.layer, before) == set()


def test_numbers_that_are_not_finite_raise_and_change_nothing():
    block = Block()
    before = state(block.layer)
    for window in (0, -1):  # one that trains, one that judges
        targets = block.targets.clone()
        targets[window, 3] = float("inf")
        with pytest.raises(RunError, match=r"model\.layers\.7"):
            block.refine(targets=targets, name="model.layers.7")
    assert changed(block.layer, before) == set()


def test_each_token_counts_by_its_relative_error():
    target, error = tiny.rand(3, 5, 8), tiny.rand(3, 5, 8, seed=1)
    scale = torch.tensor([1.0, 1e4, 1e-3], dtype=torch.float64)[:, None, None]
    alike = relative_error(target + error, target)
    torch.testing.assert_close(relative_error(scale * (target + error), scale * target), alike)
    torch.testing.assert_close(alike, (error.square().sum(-1) / target.square().sum(-1)).mean(), rtol=1e-14, atol=0)
    assert relative_error(torch.zeros(2, 4), torch.zeros(2, 4)) == 0


@pytest.mark.parametrize("shape", [(6, 40), (40, 6)])
def test_a_step_of_one_unit_changes_an_output_by_its_typical_size_at_most(shape):
    factor = tiny.rand(*shape)
    x = torch.ones(shape[1], dtype=torch.float64)  # the worst input: all its numbers have one size
    typical = factor.square().mean().sqrt() * x.norm()
    torch.testing.assert_close((step_size(factor) * torch.ones_like(factor)) @ x, typical.expand(shape[0]))


@pytest.mark.parametrize("count", [1, 2, 7, 8, 64, 1000])
def test_windows_either_train_or_judge(count):
    training, judging = split_windows(count)
    assert len(training) >= 1 and 1 <= len(judging) <= 16
    if count > 1:
        assert sorted([*training.tolist(), *judging.tolist()]) == list(range(count))


@pytest.mark.parametrize(("count", "steps", "batch"), [(5, 7, 3), (4, 3, 4), (2, 5, 8), (1, 3, 1)])
def test_draws_use_all_windows_equally_often(count, steps, batch):
    windows = torch.arange(10, 10 + count)
    batches = list(draws(windows, steps=steps, batch=batch, seed=0))
    assert [len(chosen) for chosen in batches] == [min(batch, count)] * steps
    times = torch.cat(batches).bincount(minlength=10 + count)[10:]
    assert times.max() - times.min() <= 1
    assert all(
        torch.equal(a, b) for a, b in zip(batches, draws(windows, steps=steps, batch=batch, seed=0), strict=True)
    )


def paces_of(steps: int) -> list[float]:
    """The rate of each step over the full one."""
    factor = nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.SGD([{"params": [factor], "initial_lr": 1.0}], lr=1.0)
    schedule, paces = schedule_of(optimiser, steps), []
    for _ in range(steps):
        paces.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    return paces


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 100])
def test_pace_rises_to_one_and_falls(steps):
    paces = paces_of(steps)
    top = paces.index(max(paces))
    assert max(paces) == 1 and min(paces) > 0
    assert paces == sorted(paces[: top + 1]) + sorted(paces[top + 1 :], reverse=True)


def test_pace_is_a_tenth_of_rise_and_half_a_cosine():
    assert paces_of(4) == pytest.approx([1, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5], rel=1e-12)
    assert paces_of(20)[:2] == [0.5, 1]
    for steps in (1, 7, 40, 256):
        rise = max(1, round(steps / 10))
        fall = [0.5 * (1 + math.cos(math.pi * number / (steps - rise + 1))) for number in range(1, steps - rise + 1)]
        assert paces_of(steps) == pytest.approx([(n + 1) / rise for n in range(rise)] + fall, rel=1e-11)
