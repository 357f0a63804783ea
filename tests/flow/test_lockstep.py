"""component/flow/lockstep.py: passes that stop midway see, and return, what an undisturbed forward pass does."""

import copy
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from component.flow.lockstep import lockstep
from component.format.linear import LowRankLinear
from tests import tiny
from utils.errors import RunError
from utils.layers import DecoderLayer, describe_layers, layer_inputs, run_layer

FAMILIES = ["llama-gqa", "qwen2", "gemma2", "opt"]
WINDOWS = tiny.token_windows(5, 24)
BATCHES = [2, 2, 1]  # windows of each
Layer = tuple[nn.Module, DecoderLayer, tuple[Tensor, ...], dict]


def second_layer(family: str) -> Layer:
    """A decoder layer, its description, batches of inputs, keywords."""
    model = tiny.build(family)
    described = describe_layers(model)[1]
    hidden, keywords = layer_inputs(model, WINDOWS)
    return model.get_submodule(described.name), described, hidden.split(BATCHES), keywords[1]


def stops_of(described: DecoderLayer) -> dict[str, str | None]:
    return {group[0]: described.residuals.get(group[0]) for group in described.groups}


@torch.no_grad()
def undisturbed(layer: nn.Module, batch: Tensor, keywords: dict, names: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """The layer's output in a plain forward pass, and what the named submodules receive."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable:
        return lambda _module, args, kwargs: seen.update({name: args[0] if args else kwargs["hidden_states"]})

    handles = [
        layer.get_submodule(name).register_forward_pre_hook(keep(name), with_kwargs=True) for name in names if name
    ]
    output = run_layer(layer, batch, keywords)
    for handle in handles:
        handle.remove()
    return output, {"": batch, **seen}


def patched(layer: nn.Module) -> list[str]:
    """Submodules with a forward or a hook of their own."""
    return [n for n, module in layer.named_modules() if "forward" in vars(module) or module._forward_pre_hooks]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("waiting", [None, 1, 0])
@pytest.mark.parametrize("family", FAMILIES)
def test_stops_see_what_hooks_on_a_plain_forward_pass_see(family, waiting):
    layer, described, batches, keywords = second_layer(family)
    stops = stops_of(described)
    streams = [stream for stream in stops.values() if stream is not None]
    assert len(streams) == (0 if family == "gemma2" else 2)  # its norms stand between a writer and the stream
    plain = [undisturbed(layer, batch, keywords, [*stops, *streams]) for batch in batches]
    with lockstep(layer, stops, batches, keywords=keywords, waiting=waiting) as flow:
        for linear, stream in stops.items():
            for stop, batch, (_, seen) in zip(flow.at(linear), batches, plain, strict=True):
                assert (stop.linear, stop.windows) == (linear, len(batch))
                assert torch.equal(stop.x, seen[linear])
                if stream is None:
                    assert stop.stream is None
                else:
                    assert torch.equal(stop.stream, seen[stream])
        outputs = list(flow.outputs())
    assert all(torch.equal(found, expected) for found, (expected, _) in zip(outputs, plain, strict=True))
    assert not any(output.requires_grad for output in outputs)
    assert patched(layer) == []


def replaced(linear: nn.Linear) -> LowRankLinear:
    u, v = tiny.rand(linear.out_features, 5, seed=1), tiny.rand(5, linear.in_features, seed=2)
    return LowRankLinear.from_factors(u, v, linear.bias, torch.float32)


@pytest.mark.parametrize("waiting", [None, 1, 0])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_linear_that_was_replaced_meanwhile_is_passed_through_in_its_new_form(family, waiting):
    """Whether it is the one where the passes wait, or another of its group that they have not reached yet."""
    layer, described, batches, keywords = second_layer(family)
    new = {name: replaced(layer.get_submodule(name)) for name in described.linears()}
    changed = copy.deepcopy(layer)
    for name, module in new.items():
        changed.set_submodule(name, module)
    stops = stops_of(described)
    plain = [undisturbed(changed, batch, keywords, list(stops)) for batch in batches]
    with lockstep(layer, stops, batches, keywords=keywords, waiting=waiting) as flow:
        for group in described.groups:
            for stop, (_, seen) in zip(flow.at(group[0]), plain, strict=True):
                assert torch.equal(stop.x, seen[group[0]])
            for name in group:
                layer.set_submodule(name, new[name])
        outputs = list(flow.outputs())
    assert all(torch.equal(found, expected) for found, (expected, _) in zip(outputs, plain, strict=True))
    assert patched(layer) == []


@pytest.mark.parametrize("waiting", [None, 2])
def test_two_flows_go_side_by_side(waiting):
    layer, described, batches, keywords = second_layer("llama-gqa")
    other = copy.deepcopy(layer)
    other.get_submodule("self_attn.o_proj").weight.mul_(0.5)
    stops = stops_of(described)
    plain = [[undisturbed(each, batch, keywords, list(stops)) for batch in batches] for each in (layer, other)]
    flows = [lockstep(each, stops, batches, keywords=keywords, waiting=waiting) for each in (layer, other)]
    with flows[0] as first, flows[1] as second:
        for linear in stops:
            for index, pair in enumerate(zip(first.at(linear), second.at(linear), strict=True)):
                assert all(torch.equal(stop.x, flow[index][1][linear]) for stop, flow in zip(pair, plain, strict=True))
        for flow, expected in zip((first, second), plain, strict=True):
            assert all(torch.equal(found, output) for found, (output, _) in zip(flow.outputs(), expected, strict=True))


def test_only_passes_that_do_not_wait_run_again_and_they_keep_nothing():
    layer, described, batches, keywords = second_layer("llama-gqa")
    stops, seen, alive = stops_of(described), list[int](), threading.active_count()
    layer.get_submodule("input_layernorm").register_forward_pre_hook(lambda _module, args: seen.append(len(args[0])))
    with lockstep(layer, stops, batches, keywords=keywords, waiting=1) as flow:
        for linear in stops:
            inputs = [weakref.ref(stop.x) for stop in flow.at(linear)]
            assert [x() is not None for x in inputs] == [True, False, False]
            assert threading.active_count() <= alive + len(batches) + 1  # those of passes that ended are used again
        list(flow.outputs())
    assert seen == BATCHES + len(stops) * BATCHES[1:]


def test_the_next_layers_passes_run_in_the_same_threads():
    layer, described, batches, keywords = second_layer("llama-gqa")
    stops, used = stops_of(described), [set[int]() for _ in range(2)]
    with ThreadPoolExecutor(len(batches)) as threads:  # all of them are needed at once
        for idents in used:
            hook = layer.register_forward_pre_hook(lambda *_, idents=idents: idents.add(threading.get_ident()))
            with lockstep(layer, stops, batches, keywords=keywords, threads=threads) as flow:
                for linear in stops:
                    list(flow.at(linear))
                list(flow.outputs())
            hook.remove()
    assert used[0] == used[1] and len(used[0]) == len(batches)


def test_without_stops_it_is_a_plain_forward_pass():
    layer, _, batches, keywords = second_layer("llama-gqa")
    with lockstep(layer, {}, batches, keywords=keywords) as flow:
        outputs = list(flow.outputs())
    assert all(
        torch.equal(found, undisturbed(layer, batch, keywords, [])[0])
        for found, batch in zip(outputs, batches, strict=True)
    )


@pytest.mark.parametrize("waiting", [None, 0])
@pytest.mark.parametrize("where", ["before the first stop", "behind it"])
def test_an_error_inside_a_layer_reaches_the_caller(where, waiting):
    layer, described, batches, keywords = second_layer("llama-gqa")
    broken = layer.get_submodule("input_layernorm" if where == "before the first stop" else "self_attn.k_proj")

    def fail(*_):
        raise ValueError("no such luck")

    handle = broken.register_forward_pre_hook(fail)
    with (
        pytest.raises(ValueError, match="no such luck"),
        lockstep(layer, stops_of(described), batches, keywords=keywords, waiting=waiting) as flow,
    ):
        assert len(list(flow.at("self_attn.q_proj"))) == len(batches)
        assert where == "behind it"
        list(flow.at("self_attn.o_proj"))
    handle.remove()
    assert patched(layer) == []


@pytest.mark.parametrize("waiting", [3, 1, 0])
@pytest.mark.parametrize("stopped", [0, 1, 2, 4])
def test_leaving_early_leaves_no_thread_and_no_patch(stopped, waiting):
    """The fixture looks for threads; here one more batch than the others waits where the block is left."""
    layer, described, batches, keywords = second_layer("llama-gqa")
    stops = stops_of(described)
    alive = threading.active_count()
    with pytest.raises(KeyboardInterrupt), lockstep(layer, stops, batches, keywords=keywords, waiting=waiting) as flow:
        assert threading.active_count() == alive + waiting and patched(layer)
        for linear in list(stops)[:stopped]:
            for number, _ in enumerate(flow.at(linear)):
                if linear == list(stops)[stopped - 1] and number == 1:
                    raise KeyboardInterrupt
        raise KeyboardInterrupt
    assert threading.active_count() == alive
    assert patched(layer) == []
    assert run_layer(layer, batches[0], keywords).shape == batches[0].shape


class Odd(nn.Module):
    """A layer that calls its linears as the table says."""

    def __init__(self, calls: list[str]):
        super().__init__()
        self.calls = calls
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.calls:
            x = self.get_submodule(name)(x)
        return x


@pytest.mark.parametrize("waiting", [None, 0])
@pytest.mark.parametrize(
    ("calls", "message"),
    [
        (["a"], "b is not called once"),
        (["b", "a"], "a is not called once"),
        (["a", "a", "b"], "b is not called once"),
        (["a", "b", "a"], "called more often"),
        (["a", "b", "b"], "called more often"),
    ],
)
def test_a_linear_called_twice_or_not_at_all_is_an_error(calls, message, waiting):
    layer = Odd(calls)
    with (
        pytest.raises(RunError, match=message),
        lockstep(layer, {"a": None, "b": None}, [torch.ones(1, 3, 4)], keywords={}, waiting=waiting) as f,
    ):
        list(f.at("a"))
        list(f.at("b"))
        list(f.outputs())
    assert patched(layer) == []
