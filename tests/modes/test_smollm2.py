"""The three modes end to end on a real model, smollm2, with few windows. Minutes on a CPU."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import PIFA
from component.runner.model import LeanModel
from tests import tiny
from utils import models, sources

pytestmark = pytest.mark.slow

DENSITY = 0.4  # the smallest of the papers, where factors are nearest to losing rank
FLAGS = {"dataset": "pydoc", "model_seq_len": 64, "DEV": "cpu"}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DENSE = 30 * (2 * 576 * 576 + 2 * 192 * 576 + 3 * 576 * 1536)  # 30 layers, 9 heads of 64, 3 of keys and values


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> dict[str, dict]:
    """One run of m and pifa, and the perplexity of the original, before and after pivoting."""
    parent = tmp_path_factory.mktemp("smollm2")
    few = {"pruning_nsamples": 2, "reconstruct_nsamples": 2}
    few |= {"allocation": "uniform", "token_power": 0, "output_shrinkage": 1}  # a profile would almost double the time
    judge = {**FLAGS, "save_path": parent, "eval_nsamples": 2}
    low_rank = PIFA.run(tiny.flags("m", **FLAGS, **few, density=DENSITY, save_path=parent))
    pivots = PIFA.run(tiny.flags("pifa", save_path=parent, DEV="cpu"))
    results = {
        "original": PIFA.run(tiny.flags("ppl", **judge, model_path="original")),
        "before": PIFA.run(tiny.flags("ppl", **judge, model_path=low_rank["path"])),
        "after": PIFA.run(tiny.flags("ppl", **judge)),
    }
    return {"m": low_rank, "pifa": pivots, **results}


def stored_numbers(folder: Path) -> int:
    """Numbers in the decoder linears, from the headers of the safetensors."""
    total = 0
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            names = [name for name in file.keys() if any(f".{linear}." in name for linear in LINEARS)]  # noqa: SIM118
            total += sum(file.get_tensor(name).numel() for name in names)
    return total


def test_the_density_is_the_one_on_disk_and_within_a_hundredth_of_what_was_asked(records):
    for mode in ("m", "pifa"):
        assert records[mode]["density"] == pytest.approx(stored_numbers(Path(records[mode]["path"])) / DENSE, abs=1e-12)
    assert 0.99 * DENSITY <= records["pifa"]["density"] <= DENSITY
    assert records["m"]["density_pivoted"] == records["pifa"]["density"]
    assert len(records["pifa"]["ranks"]) == 30 * len(LINEARS)


def test_pivoting_changes_the_perplexity_by_less_than_a_thousandth(records):
    assert records["after"]["ppl"] == pytest.approx(records["before"]["ppl"], rel=1e-3)
    assert records["before"]["path"] == records["m"]["path"]
    assert records["after"]["path"] == records["pifa"]["path"]


def test_the_original_is_a_language_model_and_compression_costs(records):
    """A wrong dequantization or a lost layer would not stay near the perplexity of prose."""
    assert records["original"]["ppl"] < 60
    assert records["original"]["ppl"] < records["before"]["ppl"] < 49_152  # the size of the vocabulary
    for name in ("original", "before", "after"):
        assert (records[name]["windows"], records[name]["tokens"]) == (2, 128)
        assert (records[name]["model"], records[name]["dataset"]) == ("smollm2", "pydoc")


def test_no_rank_is_ever_raised(records):
    """What pivoting stores is the rank it was given: nothing is padded, nothing was deficient."""
    assert records["pifa"]["ranks"] == records["m"]["ranks"]


def test_gguf_blocks_are_stored_as_float32(records):
    config = json.loads((Path(records["pifa"]["path"]) / "config.json").read_text())
    assert (config["dtype"], records["m"]["dtype"], config["model_type"]) == ("float32", "float32", "llama")
    assert set(config["quantization_config"]) == {"quant_method", "format_version", "layers"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_lean_runner_takes_it_in_half_precision(dtype):
    """Its check against transformers must not ask for more than rounding leaves of logits, in bfloat16 above all."""
    model = models.load_model(sources.find_source("smollm2"), dtype)
    lean = LeanModel.from_transformers(model, 1, 16)
    tokens = torch.tensor([[504, 3575, 282, 4649, 314]])  # of a sentence
    assert tiny.relative(lean.prefill(tokens).float(), model(tokens).logits[:, -1].float()) < 0.1
