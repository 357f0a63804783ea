"""flow/streaming.py: the layer-by-layer driver against one that keeps every activation and runs whole models."""

import copy
import weakref

import pytest
import torch
from torch import Tensor, nn

from component.flow import solving
from component.flow.lockstep import lockstep
from component.flow.means import Flows, Means
from component.flow.refinement import relative_error
from component.flow.solving import add_moments
from component.flow.streaming import Compression, Refinement, compress_layers
from component.format.linear import LowRankLinear
from component.ranks.sizes import DENSE, Plan, Rank
from component.solve.moments import Moments
from component.solve.names import FACTORING, default_step
from component.solve.reconstruction import EXACT_DAMPING, PAPER_RIDGE, exact_factors
from component.solve.solver import Solver
from component.solve.solvers import make_solver
from component.solve.whitening import WHITENING_DAMPING, plain_factors
from tests import tiny
from tests.solve.scripted import Scripted
from utils.errors import RunError
from utils.layers import HeldLayers, describe_layers, layer_inputs, run_layer

CPU = torch.device("cpu")
MIX_RATIO = 0.25
WINDOWS = tiny.token_windows(6, 32)
WHITENING, RECONSTRUCTION = 4, 6  # windows; 4 x 32 tokens are more than the 96 rows of the largest Gram matrix
# what the papers call it -> --prune, --reconstruct_step, lambda
METHODS = {
    "exact": ("svd-llm", None, MIX_RATIO),
    "exact, lambda 0": ("svd-llm", None, 0.0),
    "W": ("svd-llm", 0, MIX_RATIO),
    "W+U": ("svd-llm", 1, 0.0),
    "W+M": ("svd-llm", 2, MIX_RATIO),
    "V": ("svd-llm", -1, MIX_RATIO),
    "svd": ("svd", 0, MIX_RATIO),
    "svd+M": ("svd", 2, MIX_RATIO),
}


def ranks_of(described) -> Plan:
    """Ranks that differ from module to module; the first o_proj and a whole group of the second layer stay dense."""
    names = [f"{layer.name}.{name}" for layer in described for name in layer.linears()]
    plan: Plan = {name: Rank(8 + 3 * (index % 5)) for index, name in enumerate(names)}
    dense = ("layers.0.self_attn.o_proj", "layers.1.mlp.gate_proj", "layers.1.mlp.up_proj")
    return {name: DENSE if name.endswith(dense) else size for name, size in plan.items()}


def truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    u, sigma, v = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * sigma[:rank], v[:rank]


def damped(gram: Tensor, relative: float) -> tuple[Tensor, float]:
    mu = relative * gram.diagonal().mean().item()
    return gram + mu * torch.eye(len(gram), dtype=gram.dtype), mu


def by_hand(method: str, weight: Tensor, x_dense: Tensor, x_low_rank: Tensor, rank: int) -> Tensor:
    """W' from the inputs themselves, by the formulas of the papers. x: (d_in, tokens) float64."""
    prune, step, mix_ratio = METHODS[method]
    target = weight @ (mix_ratio * x_dense + (1 - mix_ratio) * x_low_rank)
    gram = x_low_rank @ x_low_rank.T
    if step is None:
        solid, mu = damped(gram, EXACT_DAMPING)
        root = torch.linalg.cholesky(solid)
        u, v = truncated((target @ x_low_rank.T + mu * weight) @ torch.linalg.inv(root).T, rank)
        return u @ v @ torch.linalg.inv(root)
    if prune == "svd":
        u, v = truncated(weight, rank)
    else:
        seen = x_dense[:, : WHITENING * WINDOWS.shape[1]]
        root = torch.linalg.cholesky(damped(seen @ seen.T, WHITENING_DAMPING)[0])
        u, v = truncated(weight @ root, rank)
        v = v @ torch.linalg.inv(root)
    if step in (1, 2):
        inputs = v @ x_low_rank
        u = target @ inputs.T @ torch.linalg.inv(inputs @ inputs.T)
    if step in (2, -1):
        ridge = PAPER_RIDGE * torch.eye(len(gram), dtype=gram.dtype)
        v = torch.linalg.pinv(u) @ (target @ x_low_rank.T + PAPER_RIDGE * weight) @ torch.linalg.inv(gram + ridge)
    return u @ v


@torch.no_grad()
def inputs_of(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """What each named linear receives when the whole model reads all windows: (d_in, tokens) float64."""
    kept: dict[str, Tensor] = {}

    def keep(name):
        return lambda _module, args: kept.update({name: args[0].flatten(0, -2).T.double()})

    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    model(WINDOWS, use_cache=False)
    for handle in handles:
        handle.remove()
    return kept


def brute_force(model: nn.Module, described, plan, method: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Group after group: run both whole models, keep all activations, replace the group's weights.

    Returns weight and low-rank-flow input of each linear.
    """
    small, results = copy.deepcopy(model), {}
    for layer in described:
        for group in layer.groups:
            names = [f"{layer.name}.{name}" for name in group]
            dense_inputs, low_rank_inputs = inputs_of(model, names), inputs_of(small, names)
            for name in names:
                linear = small.get_submodule(name)
                inputs = dense_inputs[name], low_rank_inputs[name]
                if plan[name] is not DENSE:
                    linear.weight.copy_(by_hand(method, linear.weight.double(), *inputs, plan[name].number))
                results[name] = linear.weight.double(), low_rank_inputs[name]
    return results


def driven(model: nn.Module, plan, method: str, batch: int = 4, windows: Tensor = WINDOWS, dtype=torch.float32):
    """The driver's layers."""
    compression = Compression(plan, make_solver(*METHODS[method]), dtype=dtype)
    return walked(model, describe_layers(model), compression, batch=batch, windows=windows)


def walked(
    model: nn.Module, described, compression: Compression, *, windows: Tensor = WINDOWS, finished=None, **means
) -> dict[int, nn.Module]:
    """The same by any compression. means: batch, waiting."""
    flows = Flows(windows, whitening=WHITENING, reconstruction=RECONSTRUCTION)
    more = {"flows": flows, "means": Means(CPU, HeldLayers(model), **{"batch": 4, **means})}
    return dict(compress_layers(model, described, compression, **more, **({"finished": finished} if finished else {})))


def weights_of(layers, described) -> dict[str, Tensor]:
    found = {}
    for index, layer in enumerate(described):
        for name in layer.linears():
            module = layers[index].get_submodule(name)
            dense = isinstance(module, nn.Linear)
            found[f"{layer.name}.{name}"] = module.weight if dense else module.dense_weight()
    return found


def largest_difference(found: dict[str, Tensor], expected: dict[str, tuple[Tensor, Tensor]]) -> float:
    """Of the outputs on the calibration windows: in directions without data a weight is anything's guess."""
    assert found.keys() == expected.keys()
    return max(tiny.relative(found[name].double() @ x, weight @ x) for name, (weight, x) in expected.items())


@pytest.mark.parametrize("family", ["llama-gqa", "qwen2", "gemma2", "opt"])
@pytest.mark.parametrize("method", METHODS)
def test_the_driver_is_the_brute_force(family, method):
    """Whatever the batch; 4 windows at once leave a smaller last one."""
    model = tiny.build(family)
    described = describe_layers(model)
    plan = ranks_of(described)
    expected = brute_force(model, described, plan, method)
    for batch in (1, 4):
        found = weights_of(driven(model, plan, method, batch), described)
        assert largest_difference(found, expected) < 1e-3


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_only_planned_linears_are_replaced_and_the_model_stays_as_it_was(family):
    model = tiny.build(family).to(torch.bfloat16)
    described = describe_layers(model)
    plan = ranks_of(described)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers = driven(model, plan, "exact", dtype=torch.bfloat16)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for index, layer in enumerate(described):
        for name in layer.linears():
            size, module = plan[f"{layer.name}.{name}"], layers[index].get_submodule(name)
            original = model.get_submodule(f"{layer.name}.{name}")
            if size is DENSE:
                assert type(module) is nn.Linear and torch.equal(module.weight, original.weight)
            else:
                assert isinstance(module, LowRankLinear) and Rank(module.rank) == size
                assert {tensor.dtype for tensor in module.state_dict().values()} == {torch.bfloat16}
            assert (module.bias is None) == (original.bias is None)
            assert module.bias is None or torch.equal(module.bias, original.bias)


@pytest.mark.parametrize(("prune", "step"), [("svd", 0), ("svd-llm", 0), ("svd-llm", 1), ("svd-llm", None)])
def test_solvers_ask_only_for_the_moments_they_read(prune, step):
    solver = make_solver(prune, step, mix_ratio=MIX_RATIO)
    assert solver.needs_dense_gram == (prune == "svd-llm" and step is not None)
    assert solver.needs_low_rank_flow == solver.needs_gram == solver.needs_cross == (step != 0)
    assert not make_solver(prune, step, mix_ratio=0.0).needs_cross


def test_default_steps():
    """Exact M does not look at the factors it starts from, so plain SVD would not be plain any more."""
    assert {prune: default_step(prune) for prune in FACTORING} == {"svd-llm": None, "svd": 0, "asvd": 0}


@pytest.mark.parametrize("method", ["exact", "W", "W+M"])
@pytest.mark.parametrize("trouble", ["1 token", "dead channels"])
def test_poor_data_gives_finite_layers(trouble, method):
    """One window of 4 tokens has a Gram matrix of rank 4; a channel that is always 0 has a zero row."""
    model, windows = tiny.build(), WINDOWS
    if trouble == "1 token":
        windows = WINDOWS[:1, :4]
    else:
        for layer in model.model.layers:
            layer.input_layernorm.weight[:9] = 0
            layer.mlp.up_proj.weight[:9] = 0
    layers = driven(model, ranks_of(describe_layers(model)), method, windows=windows)
    assert all(torch.isfinite(tensor).all() for layer in layers.values() for tensor in layer.state_dict().values())


@pytest.mark.parametrize("method", ["exact", "W", "W+M"])
def test_numbers_that_are_not_finite_are_an_error_that_names_the_module(method):
    model = tiny.build()
    plan = ranks_of(describe_layers(model))
    model.model.layers[1].input_layernorm.weight[3] = float("nan")
    with pytest.raises(RunError, match=r"layers\.1\.self_attn\.q_proj"):
        driven(model, plan, method)


def test_a_weight_that_is_not_finite_is_an_error_that_names_the_module():
    """Plain SVD sees no data, and still must not write such a factor."""
    model = tiny.build()
    plan = ranks_of(describe_layers(model))
    model.model.layers[0].mlp.gate_proj.weight[3, 3] = float("nan")
    with pytest.raises(RunError, match=r"layers\.0\.mlp\.gate_proj"):
        driven(model, plan, "svd")


def test_layers_from_an_earlier_run_are_not_solved_again_and_the_flows_go_through_them():
    model = tiny.build()
    described = describe_layers(model)
    plan = ranks_of(described)
    whole = driven(model, plan, "exact")
    solver = make_solver(*METHODS["exact"])
    solved: list[str] = []

    def solve(weight, moments, rank, name):
        solved.append(name)
        return solver.solve(weight, moments, rank, what=name)

    def finished(index: int, layer: nn.Module) -> bool:
        if index == 0:
            for name, module in whole[0].named_children():
                layer.set_submodule(name, copy.deepcopy(module))
        return index == 0

    counting = Scripted(solve, needs_gram=True, needs_cross=True)
    layers = walked(model, described, Compression(plan, counting, dtype=torch.float32), finished=finished)
    assert solved and all(name.startswith("model.layers.1.") for name in solved)
    for index, layer in layers.items():
        assert all(torch.equal(t, whole[index].state_dict()[name]) for name, t in layer.state_dict().items())


@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
def test_drift_is_that_of_the_stream_that_the_module_writes_into(family):
    """Hooks on two whole models see the same streams as the driver does layer by layer."""
    model = tiny.build(family)
    described = describe_layers(model)
    small = copy.deepcopy(model)
    second = described[1]
    for name in described[0].linears():  # the first layer is another one in the low-rank flow
        small.get_submodule(f"{described[0].name}.{name}").weight.mul_(0.7)
    for writer, stream in second.residuals.items():
        where = f"{second.name}.{stream}" if stream else second.name
        name = f"{second.name}.{writer}"
        (h_dense, x_dense), (h_small, x_small) = (
            (inputs_of(each, [where])[where], inputs_of(each, [name])[name]) for each in (model, small)
        )
        moments = Moments()
        states = tuple(layer_outputs(each, described[0].name) for each in (model, small))
        layers = [each.get_submodule(second.name) for each in (model, small)]
        group = next(group for group in second.groups if writer in group)
        _, keywords = layer_inputs(model, WINDOWS)
        flows = Flows(WINDOWS, whitening=WHITENING, reconstruction=RECONSTRUCTION)
        solver = make_solver("svd-llm", None, mix_ratio=MIX_RATIO, drift_ratio=0.3)
        stops = {group[0]: stream}
        flow_of = [
            lockstep(layer, stops, state.split(4), keywords=keywords[1])
            for layer, state in zip(layers, states, strict=True)
        ]
        with flow_of[0] as dense_flow, flow_of[1] as low_rank_flow:
            start = 0
            for pair in zip(dense_flow.at(group[0]), low_rank_flow.at(group[0]), strict=True):
                add_moments(moments, *pair, solver=solver, flows=flows, weights=None, start=start)
                start += pair[0].windows
        assert tiny.relative(moments.drift, (h_dense - h_small) @ x_small.T) < 1e-5
        assert tiny.relative(moments.cross, x_dense @ x_small.T) < 1e-5


@torch.no_grad()
def layer_outputs(model: nn.Module, name: str) -> Tensor:
    kept = []
    handle = model.get_submodule(name).register_forward_hook(lambda _m, _a, output: kept.append(output))
    model(WINDOWS, use_cache=False)
    handle.remove()
    return kept[0]


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("family", ["llama-gqa", "qwen2", "opt"])
def test_tokens_are_weighed_in_gram_cross_and_drift_and_in_nothing_else(family, batch):
    """Every sum over tokens by hand. The windows of each purpose differ in number, the weights from group to group."""
    model = tiny.build(family)
    described = describe_layers(model)
    firsts = [f"{layer.name}.{group[0]}" for layer in described for group in layer.groups]
    weights = {name: tiny.rand(6, 32, seed=seed).abs().float() for seed, name in enumerate(firsts)}
    collected: dict[str, Moments] = {}

    def solve(weight: Tensor, moments: Moments, rank: int, name: str) -> tuple[Tensor, Tensor]:
        collected[name] = moments
        return plain_factors(weight, rank)

    needs = dict.fromkeys(("needs_dense_gram", "needs_gram", "needs_cross", "needs_drift"), True)
    solver = Scripted(solve, **needs, token_weights=weights.__getitem__)
    plan = {f"{layer.name}.{name}": Rank(8) for layer in described for name in layer.linears()}
    flows, means = Flows(WINDOWS, whitening=4, reconstruction=5), Means(CPU, HeldLayers(model), batch=batch)
    compression = Compression(plan, solver, dtype=torch.float32)
    layers = dict(compress_layers(model, described, compression, flows=flows, means=means))

    small = copy.deepcopy(model)
    for layer, new in zip(described, layers.values(), strict=True):
        small.set_submodule(layer.name, new)
    for layer in described:
        for group in layer.groups:
            first = f"{layer.name}.{group[0]}"
            stream = layer.residuals.get(group[0])
            names = [first] if stream is None else [first, f"{layer.name}.{stream}" if stream else layer.name]
            dense, low_rank = inputs_of(model, names), inputs_of(small, names)
            count = 5 * WINDOWS.shape[1]
            counted = low_rank[first][:, :count] * weights[first].double().flatten()[:count]
            moments = collected[first]
            whitening = dense[first][:, : 4 * WINDOWS.shape[1]]
            assert tiny.relative(moments.dense_gram, whitening @ whitening.T) < 1e-5
            assert tiny.relative(moments.gram, low_rank[first][:, :count] @ counted.T) < 1e-5
            assert tiny.relative(moments.cross, dense[first][:, :count] @ counted.T) < 1e-5
            if stream is None:
                assert moments.drift is None
            else:
                drift = (dense[names[1]] - low_rank[names[1]])[:, :count]
                if drift.norm() == 0:  # before the first linear the flows are one
                    assert not moments.drift.any()
                else:
                    assert tiny.relative(moments.drift, drift @ counted.T) < 1e-4


def layers_by(solver: Solver, model: nn.Module, **more) -> dict[int, nn.Module]:
    described = describe_layers(model)
    return walked(model, described, Compression(ranks_of(described), solver, dtype=torch.float32), **more)


def state_of(layers: dict[int, nn.Module]) -> dict[str, Tensor]:
    return {f"{index}.{key}": t for index, layer in layers.items() for key, t in layer.state_dict().items()}


@pytest.mark.parametrize("family", ["llama-gqa", "qwen2", "gemma2", "opt"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("waiting", [0, 1, 5])
def test_passes_that_begin_anew_change_no_bit(waiting, method, family):
    model = tiny.build(family)
    described = describe_layers(model)
    plan = ranks_of(described)
    compression = Compression(plan, make_solver(*METHODS[method]), dtype=torch.float32)
    found = [state_of(walked(model, described, compression, batch=1, waiting=count)) for count in (None, waiting)]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(tensor, found[1][key]) for key, tensor in found[0].items())


def test_weights_of_one_change_nothing_and_others_do():
    model = tiny.build()
    plain, ones, others = (
        state_of(
            layers_by(make_solver("svd-llm", None, mix_ratio=MIX_RATIO, drift_ratio=0.5, token_weights=weights), model)
        )
        for weights in (None, lambda _: torch.ones(6, 32), lambda _: tiny.rand(6, 32).abs().float())
    )
    assert all(torch.equal(tensor, ones[key]) for key, tensor in plain.items())
    assert not all(torch.equal(tensor, others[key]) for key, tensor in plain.items())


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 10.0])
def test_the_ridge_reaches_the_exact_solver(ridge):
    weight, x = tiny.rand(6, 8, seed=1), tiny.rand(8, 40, seed=2)
    moments = Moments(gram=tiny.gram_of(x), cross=tiny.rand(8, 40, seed=3) @ x.T)
    found = make_solver("svd-llm", None, mix_ratio=0.5, ridge=ridge).solve(weight, moments, 3, what="a")
    target = weight @ (0.5 * moments.cross + 0.5 * moments.gram)
    expected = exact_factors(weight, target, moments.gram, rank=3, damping=ridge)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert make_solver("svd-llm", None, mix_ratio=0.5).solve(weight, moments, 3, what="a")[0].equal(found[0]) == (
        ridge == 1e-3
    )


def noisy(weight: Tensor, moments: Moments, rank: int, name: str) -> tuple[Tensor, Tensor]:
    """Factors that a few steps make better, also on windows that they have not seen."""
    return tuple(
        factor + 0.3 * factor.square().mean().sqrt() * tiny.rand(*factor.shape, seed=rank)
        for factor in plain_factors(weight, rank)
    )


def test_refined_layers_come_nearer_to_both_flows_and_the_next_layer_sees_them(caplog):
    """The target is the dense flow's output by drift_ratio, else what the dense layer makes of the low-rank flow."""
    model = tiny.build()
    described = describe_layers(model)
    dense = [model.get_submodule(layer.name) for layer in described]
    hidden, keywords = layer_inputs(model, WINDOWS)
    plan = {f"{layer.name}.{name}": Rank(24) for layer in described for name in layer.linears()}
    fitted = make_solver("svd-llm", None, mix_ratio=MIX_RATIO).solve
    calls: list[str] = []

    def solve(weight: Tensor, moments: Moments, rank: int, name: str) -> tuple[Tensor, Tensor]:
        calls.append(name)
        return noisy(weight, moments, rank, name) if "layers.0" in name else fitted(weight, moments, rank, what=name)

    solver = Scripted(solve, needs_gram=True, needs_cross=True)
    refinement = Refinement(steps=24, drift_ratio=0.25, seed=1)

    def layers(refinement: Refinement | None = None, **more) -> dict[int, nn.Module]:
        compression = Compression(plan, solver, dtype=torch.float32, refinement=refinement)
        return walked(model, described, compression, **more)

    caplog.set_level("INFO", logger="pifa")
    plain, refined = layers(), layers(refinement=refinement)
    said = [message for message in caplog.messages if "refined: relative error" in message]
    assert [message.split()[0] for message in said] == [layer.name for layer in described]

    low_rank, errors = hidden, []
    for index, layer in enumerate(dense):
        target = 0.75 * run_layer(layer, low_rank, keywords[index])
        hidden = run_layer(layer, hidden, keywords[index])
        target += 0.25 * hidden
        before = run_layer(plain[index], low_rank, keywords[index])
        low_rank = run_layer(refined[index], low_rank, keywords[index])
        errors.append([relative_error(output[-1], target[-1]).item() for output in (before, low_rank)])
        assert said[index].endswith(f"-> {errors[-1][1]:.4g}")  # of 6 windows the last one judges
    assert errors[0][1] < 0.8 * errors[0][0]

    def finished(index: int, layer: nn.Module) -> bool:
        if index == 0:
            for name, module in refined[0].named_children():
                layer.set_submodule(name, copy.deepcopy(module))
        return index == 0

    calls.clear()
    again = layers(finished=finished, refinement=refinement)
    assert calls and all("layers.1" in name for name in calls)
    assert all(torch.equal(t, state_of(refined)[key]) for key, t in state_of(again).items())


def test_one_groups_moments_live_at_a_time(monkeypatch):
    """They are what takes most room on a card."""
    alive, most = weakref.WeakSet(), []

    class Counted(solving.Moments):
        __hash__ = object.__hash__

        def __init__(self):
            super().__init__()
            alive.add(self)

    def add(moments, *given, **more):
        most.append(len(alive))
        return add_moments(moments, *given, **more)

    monkeypatch.setattr(solving, "Moments", Counted)
    monkeypatch.setattr(solving, "add_moments", add)
    model = tiny.build()
    described = describe_layers(model)
    plan = {f"{layer.name}.{name}": Rank(4) for layer in described for name in layer.linears()}
    solver = make_solver("svd-llm", None, mix_ratio=0.25, drift_ratio=0.5)
    flows = Flows(tiny.token_windows(4, 16), whitening=4, reconstruction=4)
    compression = Compression(plan, solver, dtype=torch.float32)
    means = Means(torch.device("cpu"), HeldLayers(model))
    assert len(list(compress_layers(model, described, compression, flows=flows, means=means))) == len(described)
    assert set(most) == {1}
