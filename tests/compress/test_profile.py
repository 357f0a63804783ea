"""component/compress/profile.py: against backward passes through the whole model, and term by term."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import component.compress.measuring
import component.compress.profile
import component.compress.profile_kept
from component.channels.parts import parts_of
from component.compress.factor_planner import FactorPlanner
from component.compress.measuring import Profiling, Sensitivity, profile_layers
from component.compress.profile import make_profile
from component.compress.profile_kept import profile_for
from component.compress.recipe import Recipe
from component.compress.task import Profiles, Task
from component.flow.means import Flows, Means
from component.format.linear import LowRankLinear
from component.solve.moments import add_product
from component.solve.sensitivity import loss_curve
from component.solve.whitening import plain_factors
from tests import tiny
from utils.data import CalibrationWindows
from utils.errors import UsageError
from utils.layers import DecoderLayer, HeldLayers, describe_layers

WINDOWS = tiny.token_windows(3, 24)
CPU = torch.device("cpu")


def unweighted(weight: torch.Tensor) -> torch.Tensor:
    return torch.eye(len(weight), dtype=torch.float64)


@pytest.mark.parametrize("family", ["llama-gqa", "qwen2", "phi3", "opt"])
def test_the_layerwise_backward_pass_is_that_of_the_whole_model(family):
    model = tiny.build(family)
    described = describe_layers(model)
    measured = {}
    for _, layer in profile_layers(model, described, Profiling(WINDOWS, CPU, seed=5)):
        measured.update(layer.linears)
    expected = {
        name: add_product(None, g, g) for name, g in whole_model_gradients(model, list(measured), seed=5).items()
    }
    assert len(measured) == sum(len(layer.linears()) for layer in described)
    for name, sensitivity in measured.items():
        assert tiny.relative(sensitivity.output_gram.double(), expected[name]) < 1e-4
        assert sensitivity.loss_curves[0, 0] > 0


def whole_model_gradients(model, names: list[str], seed: int) -> dict[str, torch.Tensor]:
    """g of every token, (windows, length, d_out) by linear: autograd window by window, labels as the profile draws."""
    draw = torch.Generator().manual_seed(seed)
    gradients: dict[str, list[torch.Tensor]] = {name: [] for name in names}
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
            gradients[name].append(gradient.reshape(WINDOWS.shape[1], -1))
    return {name: torch.stack(parts) for name, parts in gradients.items()}


def whole_model_inputs(model, names: list[str]) -> dict[str, torch.Tensor]:
    """(windows x length, d_in) by linear."""
    kept: dict[str, torch.Tensor] = {}
    layers = [model.get_submodule(name) for name in names]
    handles = [
        layer.register_forward_pre_hook(lambda _module, args, name=name: kept.update({name: args[0].flatten(0, -2)}))
        for name, layer in zip(names, layers, strict=True)
    ]
    with torch.no_grad():
        model(WINDOWS, use_cache=False)
    for handle in handles:
        handle.remove()
    return kept


def profiled(model, batch: int = 1, **more) -> tuple[dict[str, Sensitivity], dict[str, torch.Tensor]]:
    """Sensitivities by linear, token scores by the first linear of each group."""
    linears, scores = {}, {}
    for _, layer in profile_layers(model, describe_layers(model), Profiling(WINDOWS, CPU, seed=5, batch=batch, **more)):
        linears.update(layer.linears)
        scores.update(layer.token_scores)
    return linears, scores


def scores_by_hand(gradients: dict[str, torch.Tensor], described) -> dict[str, torch.Tensor]:
    """Every linear's squared gradient norms with mean 1, and of these the mean over the group."""
    expected = {}
    for layer in described:
        for group in layer.groups:
            norms = [gradients[f"{layer.name}.{name}"].double().square().sum(-1) for name in group]
            expected[f"{layer.name}.{group[0]}"] = sum(norm / norm.mean() for norm in norms) / len(group)
    return expected


@pytest.mark.parametrize("family", ["llama-gqa", "qwen2", "phi3", "opt"])
def test_token_scores_are_the_gradient_norms_of_the_whole_model(family):
    model = tiny.build(family)
    linears, scores = profiled(model)
    expected = scores_by_hand(whole_model_gradients(model, list(linears), seed=5), describe_layers(model))
    assert scores.keys() == expected.keys()
    for name, score in scores.items():
        assert (score.shape, score.dtype) == (WINDOWS.shape, torch.float32)
        assert score.mean().item() == pytest.approx(1, rel=1e-5)
        assert tiny.relative(score.double(), expected[name]) < 1e-4


@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
def test_batches_do_not_change_a_profile(family):
    """3 windows, 2 at a time: the last batch is a smaller one."""
    model = tiny.build(family)
    one, two = profiled(model, 1), profiled(model, 2)
    for name, sensitivity in one[0].items():
        assert tiny.relative(two[0][name].output_gram, sensitivity.output_gram) < 1e-5
        assert tiny.relative(two[0][name].loss_curves, sensitivity.loss_curves) < 1e-4
    for name, scores in one[1].items():
        assert tiny.relative(two[1][name], scores) < 1e-5


def test_a_module_that_nothing_depends_on_scores_all_tokens_alike():
    model = tiny.build()
    model.model.layers[1].mlp.down_proj.weight.zero_()
    _, scores = profiled(model)
    assert torch.equal(scores["model.layers.1.mlp.gate_proj"], torch.ones(WINDOWS.shape))


@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
def test_gradients_go_through_a_draft_and_weights_come_from_the_model(family):
    model = tiny.build(family)
    described = describe_layers(model)
    draft = copy.deepcopy(model)
    for layer in described:
        for name in layer.linears():
            linear = draft.get_submodule(f"{layer.name}.{name}")
            u, v = plain_factors(linear.weight, 20)
            new = LowRankLinear.from_factors(u, v, linear.bias, torch.float32)
            draft.set_submodule(f"{layer.name}.{name}", new.requires_grad_(False))
    linears, scores = profiled(model, 2, layers=[draft.get_submodule(layer.name) for layer in described])
    gradients = whole_model_gradients(draft, list(linears), seed=5)
    inputs = whole_model_inputs(draft, list(linears))
    own = profiled(model)[0]
    for name, sensitivity in linears.items():
        g, x = gradients[name].flatten(0, 1), inputs[name]
        assert tiny.relative(sensitivity.output_gram, g.T @ g) < 1e-4
        assert tiny.relative(own[name].output_gram, g.T @ g) > 1e-2
        weight = model.get_submodule(name).weight
        curve = loss_curve(weight, add_product(None, x, x), inputs=x, gradients=g, moment=unweighted(weight))
        assert tiny.relative(sensitivity.loss_curves[0], curve) < 1e-3
    for name, expected in scores_by_hand(gradients, described).items():
        assert tiny.relative(scores[name].double(), expected) < 1e-4


@pytest.mark.parametrize(("batch", "tokens", "stride"), [(1, 24, 3), (2, 24, 3), (2, 20, 4), (1, 72, 1)])
def test_curves_are_evaluated_on_evenly_spaced_tokens_and_whitened_by_all(batch, tokens, stride, monkeypatch):
    monkeypatch.setattr(component.compress.measuring, "CURVE_TOKENS", tokens)
    model = tiny.build()
    linears, _ = profiled(model, batch)
    gradients, inputs = whole_model_gradients(model, list(linears), seed=5), whole_model_inputs(model, list(linears))
    for name, sensitivity in linears.items():
        g, x = gradients[name].flatten(0, 1), inputs[name]
        weight = model.get_submodule(name).weight
        expected = loss_curve(
            weight, add_product(None, x, x), inputs=x[::stride], gradients=g[::stride], moment=unweighted(weight)
        )
        assert tiny.relative(sensitivity.loss_curves[0], expected) < 1e-3
        assert tiny.relative(sensitivity.output_gram, g.T @ g) < 1e-4  # of all tokens


def test_a_sample_does_not_hold_the_memory_of_all_tokens(monkeypatch):
    monkeypatch.setattr(component.compress.measuring, "CURVE_TOKENS", 16)
    profiling = Profiling(torch.zeros(4, 32, dtype=torch.int64), CPU, seed=0)  # every eighth of 128 tokens
    seen = component.compress.measuring._Seen(DecoderLayer("layer", (("a",),), frozenset()), profiling)
    for seed in (1, 2):
        seen.add({"a": tiny.rand(2, 32, 5, seed=seed)}, {"a": tiny.rand(2, 32, 7, seed=seed)})
    assert [part.untyped_storage().nbytes() for parts in seen._samples.values() for part in parts] == [
        8 * 8 * width for width in (5, 5, 7, 7)
    ]
    assert [tuple(sample.shape) for sample in seen.sample("a")] == [(16, 5), (16, 7)]


def test_thinning_leaves_every_second_token_out_of_moments_and_curves_but_scores_all():
    tokens = {"a": tiny.rand(2, 8, 5, seed=1)}, {"a": tiny.rand(2, 8, 7, seed=2)}
    seen = component.compress.measuring._Seen(
        DecoderLayer("layer", (("a",),), frozenset()), Profiling(torch.zeros(2, 8), CPU, seed=0, thinning=2)
    )
    seen.add(*tokens)
    x, g = (part["a"].flatten(0, 1) for part in tokens)
    assert tiny.relative(seen.input_grams["a"], x[::2].T @ x[::2]) < 1e-6
    assert tiny.relative(seen.output_grams["a"], g[::2].T @ g[::2]) < 1e-6
    assert torch.equal(seen.sample("a")[1], g[::2])
    scores = g.square().sum(1)
    assert torch.allclose(seen.token_scores(("a",), torch.zeros(2, 8)).flatten(), scores / scores.mean())


@pytest.mark.parametrize(("windows", "thinning"), [(1, 1), (2, 1), (3, 2)])
def test_small_profiles_keep_every_token(windows, thinning, monkeypatch):
    made = []
    monkeypatch.setattr(component.compress.profile_kept, "MOMENT_TOKENS", 2 * WINDOWS.shape[1])
    monkeypatch.setattr(component.compress.profile_kept, "make_profile", lambda *given, **_: made.append(given[2]))
    settings = tiny.settings(allocation="kl", seed=1, profile_nsamples=windows)
    model = tiny.build()
    task = Task(
        settings=settings,
        model=model,
        described=[],
        modules=[],
        text=CalibrationWindows("text", WINDOWS, WINDOWS[:0]),
        flows=Flows(WINDOWS, whitening=1, reconstruction=1),
        means=Means(CPU, HeldLayers(model)),
        dtype=torch.float32,
        profiles=Profiles(parent=Path("here"), name="m", weights=""),
    )
    profile_for(task, [Recipe(0.25, 0.5, None, 0.5, 0.3)])
    assert [profiling.thinning for profiling in made] == [thinning]


def test_what_is_stored_is_read_back(tmp_path):
    """Output moments go through bfloat16, of which 8 bits are enough."""
    model = tiny.build()
    described = describe_layers(model)
    linears, scores = profiled(model)
    profile = make_profile(
        tmp_path / "p",
        "mine",
        Profiling(WINDOWS, CPU, seed=5, shrinkages=(0.1, None)),
        model=model,
        described=described,
    )
    for name, sensitivity in linears.items():
        gram = profile.output_gram(name, CPU)
        assert torch.equal(gram, gram.T) and gram.dtype == torch.float32
        assert tiny.relative(gram, sensitivity.output_gram) < 2**-8
        assert profile.curves(None)[name] == sensitivity.loss_curves[0].tolist()
    assert all(torch.equal(profile.token_scores(name), score) for name, score in scores.items())
    bare = make_profile(tmp_path / "q", "mine", Profiling(WINDOWS, CPU, seed=5), model=model, described=described)
    with pytest.raises(UsageError, match="output_gram"):  # which nobody asks of it
        bare.output_gram(next(iter(linears)), CPU)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_token_weights_are_scores_to_a_power_with_mean_one(count, tmp_path):
    """Windows that the profile has not seen weigh 1."""
    model = tiny.build()
    profile = make_profile(
        tmp_path / "p", "mine", Profiling(WINDOWS, CPU, seed=5), model=model, described=describe_layers(model)
    )
    settings = tiny.settings(reconstruct_nsamples=count)
    recipe = Recipe(0.25, 0.5, None, 0.5, 0.3)
    name = "model.layers.1.mlp.gate_proj"
    weights = FactorPlanner(settings, [], device=CPU, profile=profile).solver(recipe).token_weights(name)
    roots = profile.token_scores(name)[:count].sqrt()
    assert weights.shape == (count, WINDOWS.shape[1])
    assert torch.equal(weights[:3], roots / roots.mean()) and (weights[3:] == 1).all()
    assert (
        FactorPlanner(settings, [], device=CPU, profile=profile).solver(replace(recipe, token_power=0.0)).token_weights
        is None
    )


def test_a_profile_is_reused_by_its_owner_and_refused_to_others(tmp_path):
    model = tiny.build()
    described = describe_layers(model)
    profiling = Profiling(WINDOWS, CPU, seed=1, shrinkages=(0.3, None))
    first = make_profile(tmp_path / "p", "mine", profiling, model=model, described=described)
    bytes_before = {path.name: path.read_bytes() for path in (tmp_path / "p").iterdir()}
    again = make_profile(tmp_path / "p", "mine", profiling, model=model, described=described)
    for shrinkage in (0.3, None):
        assert again.curves(shrinkage) == first.curves(shrinkage)
    assert first.curves(0.3) != first.curves(None)
    assert {path.name: path.read_bytes() for path in (tmp_path / "p").iterdir()} == bytes_before
    with pytest.raises(UsageError, match="other flags, another model or other data"):
        make_profile(tmp_path / "p", "other", profiling, model=model, described=described)


def test_the_profile_measures_what_blocks_lose():
    model = tiny.build()
    described = describe_layers(model)
    parts = [parts_of(model.get_submodule(layer.name), layer) for layer in described]
    for index, measured in profile_layers(
        model, described, Profiling(tiny.token_windows(6, 24), CPU, seed=5, shrinkages=(None, 0.1), parts=parts)
    ):
        name, part = described[index].name, parts[index]
        curves = measured.channel_curves
        assert {key: tuple(curve.shape) for key, curve in curves.items()} == {
            f"{name}.{part.output}": (2, part.head_dim + 1),
            f"{name}.{part.down}": (2, part.channels + 1),
        }
        for curve in curves.values():
            assert (curve[:, 0] > curve[:, curve.shape[1] // 2]).all() and (curve[:, -1] == 0).all()
    for _, measured in profile_layers(model, described, Profiling(tiny.token_windows(6, 24), CPU, seed=5)):
        assert measured.channel_curves == {}
