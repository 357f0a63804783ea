"""utils/estimate.py: sums by hand, and what the tensors of a run really take."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import PIFA
from component.planner import modules_of, shapes_of, work_of
from component.streaming import Flows
from tests import tiny
from utils.estimate import Shapes, Work, estimate, profiling_bytes, solving_bytes, waiting_numbers, working_bytes
from utils.layers import describe_layers

# LLaMA-2-7B
Q, UP, DOWN = (4096, 4096), (11008, 4096), (4096, 11008)
LLAMA = Shapes(4096, 32, ((Q, Q, Q), (Q,), (UP, UP), (DOWN,)), 2, 2 * 32000 * 4096 + 65 * 4096, 2)
PAPER = Work(128 * 2048, 8192, 2, 2, 0, 2, 0, int(0.55 * 32 * LLAMA.layer_numbers))


def test_a_layer_of_llama_2_7b():
    assert LLAMA.layer_numbers == 4 * 4096**2 + 3 * 4096 * 11008
    # at the output projection: stream, its normalised copy, queries, keys, values, and what goes in
    assert waiting_numbers(LLAMA) == 6 * 4096
    assert waiting_numbers(replace(LLAMA, groups=LLAMA.groups[2:], attention=0)) == 2 * 4096 + 11008
    assert solving_bytes(LLAMA, PAPER) == 8 * (5 * 11008**2 + 3 * 4096 * 11008)
    waiting = 2 * PAPER.tokens * 6 * 4096 * 2
    assert working_bytes(LLAMA, PAPER) == pytest.approx(
        waiting + 4 * LLAMA.layer_numbers + solving_bytes(LLAMA, PAPER), rel=0.05
    )


def test_hidden_states_are_mapped_above_the_limit():
    states = 2 * PAPER.tokens * 4096 * 2
    rest = LLAMA.rest * 2
    free, mapped = (estimate(LLAMA, PAPER, True, limit) for limit in (None, states - 1))
    assert (free.host, free.mapped) == (rest + states, 0)
    assert (mapped.host, mapped.mapped) == (rest, states)
    assert mapped.disk - free.disk == states
    assert free.disk == (PAPER.stored + LLAMA.rest) * 2
    assert estimate(LLAMA, PAPER, True, states) == free
    whole = estimate(LLAMA, PAPER, True, None, whole=True)
    assert whole.host - free.host == 32 * LLAMA.layer_numbers * 2


def test_without_a_card_the_host_holds_it_all():
    card, host = (estimate(LLAMA, PAPER, on_card, None) for on_card in (True, False))
    assert card.device is not None and host.device is None
    assert host.host == card.host + card.device


def test_a_profile_keeps_the_states_of_every_layer():
    profiled = replace(PAPER, profiled=64 * 2048)
    assert profiling_bytes(LLAMA, PAPER) == 0 < profiling_bytes(LLAMA, profiled)
    assert estimate(LLAMA, profiled, True, None).host == LLAMA.rest * 2 + 35 * 64 * 2048 * 4096 * 4


@pytest.mark.parametrize("factor", [2, 3])
def test_it_grows_linearly_in_windows(factor):
    def at(times: int) -> int:
        work = replace(PAPER, tokens=times * PAPER.tokens)
        return estimate(LLAMA, work, False, None).host

    assert at(1 + factor) - at(1) == factor * (at(2) - at(1))


OPTIONS = Namespace(
    prune="svd-llm", reconstruct_step=None, old_output_factor=0.25, drift_factor=0.5, output_shrinkage=None,
    token_power=0, attn_ratio=None, use_pifa=True, density=0.6, allocation="uniform", profile_nsamples=8,
    refine_steps=0,
)  # fmt: skip


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
    work = work_of(OPTIONS, modules, Flows(tiny.token_windows(4, 32), 4, 4, 3))
    assert (work.tokens, work.batch_tokens, work.flows, work.profiled) == (128, 96, 2, 0)
    assert (work.square, work.drift) == (2, 1)


def test_what_passes_hold_while_they_wait_is_what_is_estimated():
    """Every storage that a waiting pass keeps alive, by the bytes of the tensors that appear between two stops."""
    import gc

    from component.lockstep import lockstep
    from utils.layers import layer_inputs

    model = tiny.build("llama")
    described = describe_layers(model)
    shapes = shapes_of(model, described, modules_of(model, described))
    windows = tiny.token_windows(4, 64)
    hidden, keywords = layer_inputs(model, windows)
    layer, groups = model.get_submodule(described[0].name), described[0].groups

    def storages() -> dict[int, int]:
        gc.collect()
        tensors = (one for one in gc.get_objects() if isinstance(one, torch.Tensor))
        return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}

    before, most = storages(), 0
    with lockstep(layer, {group[0]: None for group in groups}, hidden.split(1), keywords[0]) as flow:
        for group in groups:
            for _ in flow.at(group[0]):
                pass
            most = max(most, sum(size for key, size in storages().items() if key not in before))
    # the stream is the hidden states themselves, which are there anyway
    expected = windows.numel() * (waiting_numbers(shapes) - shapes.width) * shapes.size
    assert 0.8 * expected <= most <= 1.2 * expected


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
    flows = Flows(tiny.token_windows(4, 32), 4, 4, 4)
    found = estimate(shapes_of(model, described, modules), work_of(OPTIONS, modules, flows), False, None)
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert 0.8 * stored < found.disk < 1.2 * stored
