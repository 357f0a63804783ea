"""component/compress/estimate.py: sums by hand, and what the tensors of a run really take."""

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import component.compress.folder
import component.compress.pipeline
import component.flow.batches
import PIFA
from component.checkpoint import reading as files
from component.compress.estimate import (
    WAITING_SHARE,
    Machine,
    Shapes,
    Work,
    estimate,
    pass_bytes,
    profiling_bytes,
    solving_bytes,
    states_bytes,
    waiting_batches,
    waiting_numbers,
    working_bytes,
)
from component.compress.workload import shapes_of, work_of
from component.flow.lockstep import lockstep
from component.flow.means import Flows
from component.flow.modules import modules_of
from component.solve import reconstruction
from component.solve.moments import Moments
from component.solve.solvers import make_solver
from tests import tiny
from utils import report
from utils.layers import describe_layers, layer_inputs
from utils.placement import CARD_SHARE

# LLaMA-2-7B
Q, UP, DOWN = (4096, 4096), (11008, 4096), (4096, 11008)
LLAMA = Shapes(4096, 32, ((Q, Q, Q), (Q,), (UP, UP), (DOWN,)), 2, 2 * 32000 * 4096 + 65 * 4096, 2)
PAPER = Work(128 * 2048, 8192, 2, 2, 0, 2, 1, int(0.55 * 32 * LLAMA.layer_numbers))
LARGE = Shapes(
    8192, 80,
    (((8192, 8192), (1024, 8192), (1024, 8192)), ((8192, 8192),), ((28672, 8192),) * 2, ((8192, 28672),)),
    2, 2 * 32000 * 8192, 2,
)  # fmt: skip
GIB = 2**30
HOST, CARD, SMALL_CARD = Machine(None), Machine(79 * GIB), Machine(4 * GIB)


def test_a_layer_of_llama_2_7b():
    assert LLAMA.layer_numbers == 4 * 4096**2 + 3 * 4096 * 11008
    # beside the layer's input: at the output projection its normalised copy, queries, keys, values, and what goes in;
    # in the MLP the stream, its normalised copy, and what goes in
    assert [waiting_numbers(LLAMA, number) for number in range(4)] == [4096, 5 * 4096, 2 * 4096, 2 * 4096 + 11008]
    moments = 2 * 11008**2 + 4096 * 11008
    assert solving_bytes(LLAMA, PAPER, 3) == 8 * (moments + 11008**2 + 3 * 4096 * 11008 + 4 * 4096**2)
    alone = replace(PAPER, tokens=8192)
    waiting = working_bytes(LLAMA, PAPER, HOST) - working_bytes(LLAMA, alone, HOST)
    assert waiting == pytest.approx(2 * 31 * 8192 * (2 * 4096 + 11008) * 2, rel=0.01)


@pytest.mark.parametrize(("shapes", "least", "most"), [(LLAMA, 16, 20), (LARGE, 40, 60)])
def test_128_windows_on_a_card_of_80_gib(shapes, least, most):
    found = estimate(shapes, replace(PAPER, stored=int(0.55 * shapes.layers * shapes.layer_numbers)), CARD)
    assert least < found.device / GIB < most


def test_32_windows_of_7b_are_what_was_measured():
    assert 0.8 < estimate(LLAMA, replace(PAPER, tokens=32 * 2048), CARD).device / (12.1 * GIB) < 1.2


@pytest.mark.parametrize("shapes", [LLAMA, LARGE])
@pytest.mark.parametrize("free", [0, 4, 24, 79, 139])
def test_waiting_passes_take_their_share_of_the_card(shapes, free):
    machine = Machine(free * GIB)
    count = waiting_batches(shapes, PAPER, machine)
    held = [
        max(pass_bytes(shapes, PAPER, machine, number=number) for number in range(4)) * c for c in (count, count + 1)
    ]
    assert count == 1 or held[0] <= WAITING_SHARE * machine.free
    assert held[1] > WAITING_SHARE * machine.free
    assert waiting_batches(shapes, PAPER, HOST) is None


def test_device_memory_stops_growing_with_windows_once_passes_begin_anew():
    """But for the hidden states, as long as these are on the card."""
    works = [replace(PAPER, tokens=windows * 2048) for windows in (64, 128, 256)]
    found = [estimate(LLAMA, work, CARD).device - states_bytes(LLAMA, work) for work in works]
    assert found[0] == found[1]
    assert states_bytes(LLAMA, works[1]) < CARD_SHARE * CARD.free
    fewer = [estimate(LLAMA, replace(PAPER, tokens=windows * 2048), CARD).device for windows in (8, 16)]
    assert fewer[1] > fewer[0]


def test_a_layers_input_is_held_by_its_pass_where_hidden_states_are_elsewhere():
    copy = 2 * 8192 * 4096 * 2
    for number in range(4):
        assert (
            pass_bytes(LLAMA, PAPER, SMALL_CARD, number=number) - pass_bytes(LLAMA, PAPER, CARD, number=number) == copy
        )


def test_hidden_states_are_mapped_above_the_limit():
    states = states_bytes(LLAMA, PAPER)
    assert states == 2 * PAPER.tokens * 4096 * 2
    others = (LLAMA.rest + LLAMA.layer_numbers) * 2
    free, mapped = (estimate(LLAMA, PAPER, replace(SMALL_CARD, limit=limit)) for limit in (None, states - 1))
    assert (free.host, free.mapped) == (others + states, 0)
    assert (mapped.host, mapped.mapped) == (others, states)
    assert mapped.disk - free.disk == states
    assert free.disk == (PAPER.stored + LLAMA.rest) * 2
    assert estimate(LLAMA, PAPER, replace(SMALL_CARD, limit=states)) == free
    whole = estimate(LLAMA, PAPER, SMALL_CARD, whole=True)
    assert whole.host - free.host == 32 * LLAMA.layer_numbers * 2


def test_hidden_states_are_on_the_card_where_they_fit():
    card, small = (estimate(LLAMA, PAPER, replace(each, limit=1)) for each in (CARD, SMALL_CARD))
    assert (card.mapped, small.mapped) == (0, states_bytes(LLAMA, PAPER))
    assert card.host == small.host


def test_the_process_itself_counts():
    plain, more = (estimate(LLAMA, PAPER, Machine(None, None, resident)) for resident in (0, 12345))
    assert more.host - plain.host == 12345


def test_without_a_card_the_host_holds_it_all():
    found = estimate(LLAMA, PAPER, HOST)
    assert found.device is None
    assert found.host == LLAMA.rest * 2 + states_bytes(LLAMA, PAPER) + working_bytes(LLAMA, PAPER, HOST)


def test_a_profile_keeps_the_states_of_every_layer():
    profiled = replace(PAPER, profiled=64 * 2048)
    assert profiling_bytes(LLAMA, PAPER) == 0 < profiling_bytes(LLAMA, profiled)
    more = estimate(LLAMA, profiled, SMALL_CARD).host - estimate(LLAMA, PAPER, SMALL_CARD).host
    assert more == 35 * 64 * 2048 * 4096 * 4 - states_bytes(LLAMA, PAPER)


@pytest.mark.parametrize("factor", [2, 3])
def test_it_grows_linearly_in_windows(factor):
    def at(times: int) -> int:
        work = replace(PAPER, tokens=4 * times * PAPER.tokens)  # so many that one group takes most, in all of them
        return estimate(LLAMA, work, HOST).host

    assert at(1 + factor) - at(1) == factor * (at(2) - at(1))


SETTINGS = tiny.settings(density=0.6, allocation="uniform", output_shrinkage=1, token_power=0, profile_nsamples=8)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_shapes_are_those_of_the_model(family):
    model = tiny.build(family)
    described = describe_layers(model)
    modules = modules_of(model, described)
    shapes = shapes_of(model, described, modules)
    assert shapes.layers * shapes.layer_numbers == sum(module.numbers for module in modules)
    assert (shapes.width, shapes.size) == (64, 4)
    assert shapes.attention == 2
    norms = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n and p.dim() == 1)
    assert shapes.rest + norms + sum(m.numbers for m in modules) == sum(p.numel() for p in model.parameters())
    work = work_of(SETTINGS, modules, Flows(tiny.token_windows(4, 32), whitening=4, reconstruction=4), batch=3)
    assert (work.tokens, work.batch_tokens, work.flows, work.profiled) == (128, 96, 2, 0)
    assert (work.square, work.drift, work.weighted) == (2, 1, False)
    longer = Flows(tiny.token_windows(5, 32), whitening=4, reconstruction=4)
    shared = work_of(SETTINGS, modules, longer, batch=3, processes=2)
    assert shared.tokens == 80


class Allocated(TorchDispatchMode):
    """most: the bytes of all storages that operations inside have made, where they were most."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        made = [t.untyped_storage() for t in tree_iter(result) if isinstance(t, torch.Tensor)]
        for storage in made:
            key, size = storage._cdata, storage.nbytes()
            if key not in self._known | given:
                self._known.add(key)
                self.now += size
                weakref.finalize(storage, self._gone, key, size)
        self.most = max(self.most, self.now)
        return result

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("d_out", "d_in"), [(128, 512), (512, 128), (128, 352)])
def test_what_solving_allocates_is_what_is_estimated(d_out, d_in, weighted, monkeypatch):
    monkeypatch.setattr(reconstruction, "ROWS", 32)  # as few, next to d_in, as for a large model
    x = tiny.rand(d_in, 2 * d_in)
    moments = Moments(tiny.gram_of(x), tiny.rand(d_in, d_in, seed=1), drift=tiny.rand(d_out, d_in, seed=2))
    weighting = torch.eye(d_out, dtype=torch.float64)
    solver = make_solver(
        "svd-llm", None, mix_ratio=0.25, drift_ratio=0.5, weighting=(lambda _: weighting.clone()) if weighted else None
    )
    weight = tiny.rand(d_out, d_in, seed=3).half()
    with Allocated() as allocated:
        solver.solve(weight, moments, 40, what="a")
    shapes, work = Shapes(d_out, 1, (((d_out, d_in),),), 0, 0, 2), replace(PAPER, weighted=weighted)
    held = sum(tensor.nbytes for tensor in (moments.gram, moments.cross, moments.drift))
    assert 0.85 < (held + allocated.most) / solving_bytes(shapes, work, 0) < 1.05


@pytest.mark.parametrize("waiting", [4, 1])
def test_what_passes_hold_while_they_wait_is_what_is_estimated(waiting):
    """Every storage that a waiting pass keeps alive, by the bytes of the tensors that appear between two stops."""
    model = tiny.build("llama")
    described = describe_layers(model)
    shapes = shapes_of(model, described, modules_of(model, described))
    windows = tiny.token_windows(4, 64)
    hidden, keywords = layer_inputs(model, windows)
    layer, groups = model.get_submodule(described[0].name), described[0].groups

    def storages() -> dict[int, torch.UntypedStorage]:
        gc.collect()
        plain = (torch.Tensor, torch.nn.Parameter)  # what a compiler has left behind in this process has no memory
        found = (one.untyped_storage() for one in gc.get_objects() if type(one) in plain)
        return {storage.data_ptr(): storage for storage in found}

    before = storages()  # they are kept: what goes would leave its place to what comes
    with lockstep(
        layer, {group[0]: None for group in groups}, hidden.split(1), keywords=keywords[0], waiting=waiting
    ) as flow:
        for number, group in enumerate(groups):
            assert sum(stop.windows for stop in flow.at(group[0])) == 4
            held = sum(storage.nbytes() for key, storage in storages().items() if key not in before)
            expected = waiting * 64 * waiting_numbers(shapes, number) * shapes.size
            assert 0.8 * expected <= held <= 1.2 * expected


def test_the_disk_is_estimated_and_said_before_the_work(arguments, tmp_path, caplog):
    caplog.set_level("INFO", logger="pifa")
    folder = Path(PIFA.run(arguments("m", save_path=tmp_path, density=0.6, allocation="uniform"))["path"])
    (said,) = (message for message in caplog.messages if message.startswith("estimate: "))
    assert "host memory" in said and "disk" in said and "device" not in said
    order = [number for number, text in enumerate(caplog.messages) if "estimate:" in text or " s for one layer" in text]
    assert len(order) == 2
    model = tiny.build()
    described = describe_layers(model)
    modules = modules_of(model, described)
    flows = Flows(tiny.token_windows(4, 32), whitening=4, reconstruction=4)
    found = estimate(shapes_of(model, described, modules), work_of(SETTINGS, modules, flows, batch=4), HOST)
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert 0.8 * stored < found.disk < 1.2 * stored


def test_a_card_without_room_changes_what_is_said_and_nothing_else(arguments, tmp_path, caplog, monkeypatch):
    """Batches of one window, of which one waits."""
    caplog.set_level("INFO", logger="pifa")
    monkeypatch.setattr(component.flow.batches, "BATCH_TOKENS", 32)
    counts, driver = [], component.compress.pipeline.compress_layers

    def watched(*given, **more):
        counts.append(more["means"].waiting)
        return driver(*given, **more)

    monkeypatch.setattr(component.compress.pipeline, "compress_layers", watched)
    folders = []
    for name, free in (("host", None), ("card", 1)):
        monkeypatch.setattr(component.compress.folder, "free_bytes", lambda device, free=free: free)
        command = arguments("m", save_path=tmp_path / name, density=0.6, allocation="uniform")
        folders.append(tiny.contents(Path(PIFA.run(command)["path"]), (files.RECORD,)))
    assert counts == [None, 1]
    assert folders[0] == folders[1]
    said = [message for message in caplog.messages if message.startswith("estimate: ")]
    assert ["device memory" in text for text in said] == [False, True]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks the system")
def test_the_memory_of_the_process_grows_by_what_it_holds():
    before = report.resident_memory()
    held = torch.ones(2**24)
    grown = report.resident_memory() - before
    assert 0.9 * held.nbytes < grown < 1.5 * held.nbytes
    assert report.resident_memory() <= report.peak_memory() * 1.01
