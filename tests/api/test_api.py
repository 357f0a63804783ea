"""component/api: what is made in memory is what the commands write, and a notebook's mistakes get one line."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import component
import component.flow.solving
import PIFA
from component import LowRankLinear, PIFALinear, compress_model, judge_model, pivot_model, save_model
from component.compress.recipe import VALUES
from tests import tiny
from tests.conftest import SMALL
from utils.errors import RunError, UsageError

REPOSITORY = Path(PIFA.__file__).parent
FLAGS = {**SMALL, "density": 0.6}


@pytest.fixture
def tokenizer(model_folder):
    return AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture
def model(model_folder):
    return AutoModelForCausalLM.from_pretrained(model_folder)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny.token_windows(2, 16), use_cache=False).logits


def test_names_are_those_that_docs_name():
    assert all(getattr(component, name) is not None for name in component.__all__)
    with pytest.raises(AttributeError, match="no attribute 'compres_model'"):
        component.compres_model  # noqa: B018


@pytest.mark.parametrize("changes", [{}, {"prune": "svd", "use_pifa": False}, {"passes": 2}, {"allocation": "type"}])
def test_a_model_in_memory_gets_the_tensors_that_the_command_writes(
    changes, model, tokenizer, text_file, arguments, tmp_path
):
    small = compress_model(model, tokenizer, dataset=str(text_file), **FLAGS, **changes)
    flags = {**changes, "no-use_pifa": changes.get("use_pifa") is False, "use_pifa": None}
    folder = Path(PIFA.run(arguments("m", density=0.6, save_path=tmp_path, **flags))["path"])
    assert small is model and torch.equal(logits(small), logits(AutoModelForCausalLM.from_pretrained(folder)))


def test_pivoting_in_memory_is_pivoting_the_folder(model, tokenizer, text_file, pivoted):
    compress_model(model, tokenizer, dataset=str(text_file), **FLAGS)
    before = logits(model)
    assert pivot_model(model) is model
    assert not any(type(module) is LowRankLinear for module in model.modules())
    assert tiny.relative(logits(model), before) < 1e-5
    stored = AutoModelForCausalLM.from_pretrained(pivoted)
    found = {name: module for name, module in model.named_modules() if isinstance(module, PIFALinear)}
    assert found
    for name, module in found.items():
        for key, tensor in stored.get_submodule(name).state_dict().items():
            assert torch.equal(module.state_dict()[key], tensor)


def test_what_is_saved_is_read_by_every_mode(model, tokenizer, text_file, tmp_path, good):
    compress_model(model, tokenizer, dataset=str(text_file), **FLAGS)
    record = save_model(model, tokenizer, tmp_path / "low-rank")
    assert record["density_pivoted"] <= 0.6 and record["density_asked"] == 0.6
    judged = judge_model(model, tokenizer, dataset=str(text_file), model_seq_len=32, eval_nsamples=3)
    on = ["--DEV", "cpu", "--save_path", str(tmp_path)]
    argv = ["--mode", "ppl", "--model_path", record["path"], "--dataset", str(text_file), "--model_seq_len", "32", *on]
    assert good([*argv, "--eval_nsamples", "3"])["ppl"] == pytest.approx(judged.ppl, rel=1e-6)
    folder = good(["--mode", "pifa", "--model_path", record["path"], *on])["path"]
    pivot_model(model)
    saved = Path(save_model(model, tokenizer, tmp_path / "pivoted")["path"])
    assert tiny.contents(saved, ("pifa.json", "manifest.json")).items() <= tiny.contents(Path(folder)).items()
    loaded = AutoModelForCausalLM.from_pretrained(saved)
    assert torch.equal(logits(loaded), logits(model))
    assert good(["--mode", "info", "--model_path", str(saved), *on])["density"] == pytest.approx(
        record["density_pivoted"]
    )


def test_a_profile_that_is_kept_serves_again_and_no_other_model(model_folder, tokenizer, text_file, tmp_path):
    kept = {**FLAGS, "dataset": str(text_file), "profiling_mat_path": str(tmp_path / "profile")}
    found = []
    for _ in range(2):
        model = AutoModelForCausalLM.from_pretrained(model_folder)
        found.append(logits(compress_model(model, tokenizer, **kept)))
    assert torch.equal(*found)
    other = tiny.build(seed=7)
    with pytest.raises(UsageError, match="was started with other flags, another model or other data"):
        compress_model(other, tokenizer, **kept)


def test_a_folder_that_was_loaded_is_pivoted_and_saved(compressed, pivoted, tokenizer, tmp_path, good):
    model = AutoModelForCausalLM.from_pretrained(compressed)
    record = save_model(pivot_model(model), tokenizer, tmp_path / "saved")
    assert record["kind"] == "pifa" and record["density_asked"] is None
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(model))
    told = good(["--mode", "info", "--model_path", record["path"], "--save_path", str(tmp_path), "--DEV", "cpu"])
    assert told["density"] == record["density"] == record["density_pivoted"]


def test_the_record_names_what_was_chosen(model, tokenizer, text_file, tmp_path):
    flags = {**FLAGS, "dataset": str(text_file), "tune": 4, "allocation": "uniform"}
    compress_model(model, tokenizer, **flags)
    record = save_model(model, tokenizer, tmp_path / "tuned")
    best = min(record["tuned"], key=lambda tried: tried["heldout_ppl"])
    assert {name: record[name] for name in VALUES} == {name: best[name] for name in VALUES}
    assert len(record["windows_sha256"]) == 64 and record["heldout_nsamples"] > 0


def test_channels_that_are_gone_are_what_was_paid_for(model, tokenizer, text_file, tmp_path):
    compress_model(model, tokenizer, dataset=str(text_file), prune="flatllm", **{**FLAGS, "density": 0.7})
    record = save_model(model, tokenizer, tmp_path / "narrow")
    assert (record["kind"], record["ranks_paid_for"]) == ("narrow", "channels")
    with pytest.raises(UsageError, match="no low-rank linears to pivot"):
        pivot_model(model)


def test_an_error_in_mid_model_leaves_it_as_it_was(model, tokenizer, text_file, monkeypatch):
    before, run = logits(model), component.flow.solving._solved

    def broken(layer, name, rank, **more):
        if layer.described.name.endswith("1"):
            raise RunError("no more")
        return run(layer, name, rank, **more)

    monkeypatch.setattr(component.flow.solving, "_solved", broken)
    with pytest.raises(RunError, match="no more"):
        compress_model(model, tokenizer, dataset=str(text_file), **FLAGS)
    assert torch.equal(logits(model), before) and not hasattr(model.config, "quantization_config")


def test_a_ratio_is_a_density_the_other_way_round(model_folder, tokenizer, text_file):
    found = []
    for size in ({"density": 0.6}, {"overall_ratio": 0.4}):
        model = AutoModelForCausalLM.from_pretrained(model_folder)
        found.append(logits(compress_model(model, tokenizer, dataset=str(text_file), **SMALL, **size)))
    assert torch.equal(*found)


MISTAKES = {
    "a folder": ({"save_path": "here"}, "compress_model has no save_path: save_model takes the folder"),
    "another dtype": ({"dtype": "bfloat16"}, "convert the model"),
    "a density in words": ({"density": "0.7"}, "density='0.7': this takes float"),
    "half a window": ({"pruning_nsamples": 2.5}, "pruning_nsamples=2.5: this takes int"),
    "no flag": ({"densty": 0.5}, "densty is no flag"),
    "no density": ({"density": 0.0}, "--density 0 is outside"),
    "no pruner": ({"prune": "magnitude"}, "unknown --prune magnitude"),
    "no text": ({"dataset": "absent.txt"}, "unknown dataset absent.txt"),
    "two of one kind": ({"overall_ratio": 0.2}, "say the same thing"),
    "a step that needs more": ({"reconstruct_step": 0, "refine_steps": 3}, "needs a reconstruction"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_refused_before_the_work(mistake, model, tokenizer, text_file):
    changes, word = MISTAKES[mistake]
    before = logits(model)
    with pytest.raises(UsageError, match=word):
        compress_model(model, tokenizer, **{**FLAGS, "dataset": str(text_file), **changes})
    assert torch.equal(logits(model), before)


def test_what_is_done_already_or_not_yet_is_refused(model, tokenizer, text_file, tmp_path):
    with pytest.raises(UsageError, match="no low-rank linears to pivot"):
        pivot_model(model)
    with pytest.raises(UsageError, match="not compressed"):
        save_model(model, tokenizer, tmp_path / "new")
    compress_model(model, tokenizer, dataset=str(text_file), **FLAGS)
    with pytest.raises(UsageError, match="compressed or quantized already"):
        compress_model(model, tokenizer, dataset=str(text_file), **FLAGS)
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match="nothing is ever overwritten"):
        save_model(model, tokenizer, tmp_path / "there")


def test_the_block_in_the_readme_does_what_it_says(model_folder, tmp_path, monkeypatch, capsys):
    """As it stands there, with a tiny model's folder in place of the hub's name."""
    text = (REPOSITORY / "README.md").read_text()
    block = (
        text.partition("<!-- python -->")[2].partition("<!-- /python -->")[0].strip().strip("`").removeprefix("python")
    )
    assert len(block.strip().splitlines()) <= 10 and "meta-llama/Llama-2-7b-hf" in block
    monkeypatch.chdir(tmp_path)
    exec(compile(block.replace("meta-llama/Llama-2-7b-hf", str(model_folder)), "README.md", "exec"), {})
    ppl = float(capsys.readouterr().out.strip())
    assert 1 < ppl < float("inf")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "results" / "llama-0.8")
    assert any(isinstance(module, PIFALinear) for module in saved.modules())
