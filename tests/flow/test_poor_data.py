"""PIFA.py: poor data never kills a run, and numbers that stop being finite end it with a name."""

from pathlib import Path

import pytest
import torch

from tests import tiny

SOLVERS = [("svd-llm", None), ("svd-llm", 0), ("svd-llm", 1), ("svd-llm", 2), ("svd-llm", -1), ("svd", 2)]


def kill_channels(model) -> None:
    """Inputs of q, k, v and of down that are always 0."""
    for layer in model.model.layers:
        layer.input_layernorm.weight[:9] = 0
        layer.mlp.up_proj.weight[:9] = 0


def kill_a_module(model) -> None:
    """A weight of zeros, and an input of zeros for the module after it."""
    model.model.layers[0].self_attn.v_proj.weight.zero_()


POOR = {
    "one sample": (lambda model: None, {"pruning_nsamples": 1, "reconstruct_nsamples": 1}),
    "one sample of two tokens": (
        lambda model: None,
        {"pruning_nsamples": 1, "reconstruct_nsamples": 1, "model_seq_len": 2, "eval_nsamples": 4},
    ),
    "dead channels": (kill_channels, {}),
    "a dead module": (kill_a_module, {}),
}


@pytest.mark.parametrize(("prune", "step"), SOLVERS)
@pytest.mark.parametrize("trouble", POOR)
def test_poor_data_never_kills_a_run(trouble, prune, step, arguments, tmp_path, good):
    change, flags = POOR[trouble]
    model = tiny.build()
    change(model)
    folder = tiny.save_model(tmp_path / "model", model)
    for mode in ("m", "pifa", "ppl"):
        more = {"prune": prune, "reconstruct_step": step, "density": 0.6}
        record = good(arguments(mode, model=folder, save_path=tmp_path / "new", **flags, **more))
    assert record["ppl"] > 1
    stored = tiny.stored_tensors(Path(record["path"]))
    assert all(torch.isfinite(tensor).all() for tensor in stored.values())


def test_too_few_tokens_are_a_warning_that_says_how_many_windows_are_needed(arguments, tmp_path, good, caplog):
    good(arguments("m", save_path=tmp_path, reconstruct_nsamples=2))
    warning = "64 calibration tokens for Gram matrices of 96 rows: at least 3 windows would be needed"
    assert caplog.messages.count(warning) == 1
    caplog.clear()
    good(arguments("m", save_path=tmp_path, reconstruct_nsamples=3))
    assert not any("would be needed" in message for message in caplog.messages)


@pytest.mark.parametrize(("prune", "step"), SOLVERS)
def test_a_weight_that_is_not_finite_ends_the_run_with_the_modules_name(prune, step, arguments, tmp_path, bad):
    model = tiny.build()
    model.model.layers[1].mlp.gate_proj.weight[3, 5] = float("nan")
    folder = tiny.save_model(tmp_path / "model", model)
    command = arguments("m", model=folder, save_path=tmp_path / "new", prune=prune, reconstruct_step=step)
    bad(command, "model.layers.1.mlp.gate_proj", code=1)


def test_a_loss_that_is_not_finite_ends_the_run_with_the_windows_number(arguments, tmp_path, bad):
    model = tiny.build()
    model.model.norm.weight[0] = float("nan")
    folder = tiny.save_model(tmp_path / "model", model)
    bad(arguments("ppl", model=folder, model_path="original"), "window 0", code=1)
