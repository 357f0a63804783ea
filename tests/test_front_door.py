"""PIFA.py: flags in, one record out; every mistake ends before the work, with exit code 2 and one line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import component.compress
import PIFA
from tests import tiny
from utils import data

REPOSITORY = Path(PIFA.__file__).parent


@pytest.fixture
def bad(capsys):
    """bad(argv, word, code=2): run the command, which has to fail with one line that contains `word`."""

    def check(argv: list[str], word: str, code: int = 2) -> None:
        assert PIFA.main([str(argument) for argument in argv]) == code
        out, err = capsys.readouterr()
        lines = err.splitlines()
        assert out == ""
        assert lines[-1].startswith("PIFA.py: ") and word in lines[-1]
        assert sum(line.startswith("PIFA.py:") for line in lines) == 1
        assert "Traceback" not in err

    return check


@pytest.fixture
def good(capsys):
    """good(argv): run the command, which has to end well; returns the record, the last line of stdout."""

    def check(argv: list[str]) -> dict:
        assert PIFA.main([str(argument) for argument in argv]) == 0
        lines = capsys.readouterr().out.splitlines()
        return json.loads(lines[-1], parse_constant=pytest.fail)  # NaN is no JSON

    return check


# flags that are wrong whatever the model -> a word of the line
BAD_FLAGS = {
    "mode": ({"mode": "compress"}, "unknown --mode compress: use one of m, pifa, ppl"),
    "dataset": ({"dataset": "wikitext3"}, "unknown dataset wikitext3: use one of wikitext2"),
    "pruner": ({"prune": "magnitude"}, "unknown --prune magnitude: use one of svd-llm, svd"),
    "allocation": ({"allocation": "equal"}, "unknown --allocation equal: use one of uniform, type"),
    "dtype": ({"dtype": "int8"}, "unknown --dtype int8: use one of float32"),
    "reconstruct_step": ({"reconstruct_step": 3}, "unknown --reconstruct_step 3: use one of 0, 1, 2, -1"),
    "no whitening samples": ({"pruning_nsamples": 0}, "--pruning_nsamples 0 is below 1"),
    "no reconstruction samples": ({"reconstruct_nsamples": 0}, "--reconstruct_nsamples 0 is below 1"),
    "less than none": ({"reconstruct_nsamples": -5}, "--reconstruct_nsamples -5 is below 1"),
    "no window": ({"model_seq_len": 0}, "--model_seq_len 0 is below"),
    "no evaluation windows": ({"eval_nsamples": 0}, "--eval_nsamples 0 is below 1"),
    "no batch": ({"eval_batch_size": 0}, "--eval_batch_size 0 is below 1"),
    "not a number": ({"pruning_nsamples": "many"}, "argument --pruning_nsamples"),
    "a ratio of one": ({"overall_ratio": 1.0}, "--overall_ratio 1 is outside [0,1)"),
    "a ratio below zero": ({"overall_ratio": -0.1}, "--overall_ratio -0.1 is outside [0,1)"),
    "a ratio that is no number": ({"overall_ratio": "nan"}, "--overall_ratio nan is outside [0,1)"),
    "an attention ratio of one": ({"attn_ratio": 1.0}, "--attn_ratio 1 is outside [0,1)"),
    "no density": ({"density": 0.0}, "--density 0 is outside (0,1]"),
    "a density above one": ({"density": 1.1}, "--density 1.1 is outside (0,1]"),
    "both": ({"density": 0.5, "overall_ratio": 0.5}, "--density and --overall_ratio"),
    "a mix ratio above one": ({"old_output_factor": 1.5}, "--old_output_factor 1.5 is outside [0,1]"),
    "type without its ratio": ({"allocation": "type"}, "--allocation type needs --attn_ratio"),
    "two allocations": ({"allocation": "uniform", "attn_ratio": 0.2}, "can't go with uniform"),
    "several texts": ({"dataset": ["pydoc", "pydoc"]}, "several --dataset are for --mode ppl"),
    "another machine": ({"DEV": "tpu"}, "unknown --DEV tpu: use cpu, cuda or cuda:N"),
    "a card that is no number": ({"DEV": "cuda:first"}, "unknown --DEV cuda:first"),
    "a card that is absent": ({"DEV": "cuda:99"}, "--DEV cpu works everywhere"),
    "an abbreviation": ({"overall": 0.2}, "unrecognized arguments: --overall"),
    "an unknown flag": ({"sparsity": 0.2}, "unrecognized arguments: --sparsity"),
}


@pytest.mark.parametrize("mistake", BAD_FLAGS)
def test_bad_flags(mistake, arguments, tmp_path, bad):
    changes, word = BAD_FLAGS[mistake]
    mode = changes.get("mode", "m")
    flags = {name: value for name, value in changes.items() if name != "mode"}
    bad(arguments(mode, save_path=tmp_path / "new", **flags), word)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("mode", ["m", "pifa", "ppl", "generate"])
def test_flags_are_checked_in_every_mode(mode, arguments, bad):
    bad(arguments(mode, eval_batch_size=0), "--eval_batch_size 0 is below 1")


def test_a_mode_is_needed(bad):
    bad([], "--mode")


@pytest.mark.parametrize("mode", ["m", "pifa", "ppl"])
def test_cuda_asked_for_but_absent(mode, arguments, bad, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    bad(arguments(mode, DEV="cuda"), "--DEV cuda: this machine has 0 CUDA devices")


# what makes a --model wrong, given a folder with a good one -> the argument; and a word of the line


def without(name: str):
    def make(folder: Path) -> Path:
        (folder / name).unlink()
        return folder

    return make


def pickled_only(folder: Path) -> Path:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return folder


def damaged(folder: Path) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return folder


def without_linears(folder: Path) -> Path:
    """GPT-2 multiplies by layers of its own."""
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=2, n_positions=64, vocab_size=264)
    return tiny.save_model(folder / "gpt2", AutoModelForCausalLM.from_config(config))


BAD_MODELS = {
    "no config": (without("config.json"), "has no config.json"),
    "no weights": (without("model.safetensors"), "cannot load model"),
    "no tokenizer": (without("tokenizer.json"), "cannot load model"),
    "pickled weights": (pickled_only, "holds pickled weights only"),
    "a damaged shard": (damaged, "cannot load model"),
    "no decoder linears": (without_linears, "GPT2LMHeadModel has no decoder layers with linears"),
    "no such folder": (lambda folder: folder / "absent", "no such model folder"),
    "no such file": (lambda folder: folder / "absent.gguf", "no such file"),
    "a pickle": (lambda folder: folder / "model.pt", "is a pickle, which is never read"),
    "no GGUF": (lambda folder: shutil.copy(folder / "config.json", folder / "model.gguf"), "cannot load model"),
    "a hub id out of reach": (lambda folder: "nobody/nothing", "cannot load model nobody/nothing"),
}


@pytest.mark.parametrize("mistake", BAD_MODELS)
def test_bad_models(mistake, model_folder, arguments, tmp_path, bad):
    make, word = BAD_MODELS[mistake]
    model = make(shutil.copytree(model_folder, tmp_path / "model"))
    bad(arguments("m", model=model, save_path=tmp_path / "new"), word)
    assert not (tmp_path / "new").exists()


def test_a_compressed_model_is_not_compressed_again(compressed, pivoted, arguments, tmp_path, bad):
    for folder in (compressed, pivoted):
        bad(arguments("m", model=folder, save_path=tmp_path), "is compressed already")
    bad(arguments("ppl", model=compressed, model_path="original"), "is compressed already")


BAD_SIZES = {
    "attention ratio": ({"overall_ratio": 0.1, "attn_ratio": 0.9}, "an attention ratio between"),
    "no rank": ({"density": 0.01}, "it needs at least"),
}


@pytest.mark.parametrize("mistake", BAD_SIZES)
def test_sizes_that_the_models_shapes_do_not_allow(mistake, arguments, tmp_path, bad):
    changes, word = BAD_SIZES[mistake]
    bad(arguments("m", save_path=tmp_path / "new", **changes), word)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("mode", ["m", "ppl"])
def test_a_text_shorter_than_one_window(mode, arguments, tmp_path, bad):
    (tmp_path / "short.txt").write_text("too short")
    path = "original" if mode == "ppl" else None
    bad(arguments(mode, dataset=tmp_path / "short.txt", model_path=path), "too few for a window of 32")


# what makes a --model_path wrong, given a copy of a low-rank checkpoint -> the argument


def harmed(shard: str, missing: bool = False):
    def make(folder: Path) -> Path:
        content = bytearray((folder / shard).read_bytes())
        content[-1] ^= 1
        (folder / shard).unlink()
        if not missing:
            (folder / shard).write_bytes(content)
        return folder

    return make


def pickle_file(folder: Path) -> Path:
    (folder / "model.pt").write_bytes(b"nothing")
    return folder / "model.pt"


def empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


BAD_PATHS = {
    "a damaged shard": (harmed("layer-00001.safetensors"), "layer-00001.safetensors is damaged"),
    "a damaged rest": (harmed("rest.safetensors"), "rest.safetensors is damaged"),
    "a missing shard": (harmed("layer-00000.safetensors", missing=True), "layer-00000.safetensors is missing"),
    "an unfinished run": (without("pifa.json"), "is unfinished: run its command again with --resume"),
    "an empty folder": (empty, "is not a checkpoint of this tool"),
    "a pickle": (pickle_file, "pickles (.pt) of other tools are never read"),
    "nothing": (lambda folder: folder / "absent", "no such checkpoint"),
}


@pytest.mark.parametrize("mode", ["pifa", "ppl", "generate"])
@pytest.mark.parametrize("mistake", BAD_PATHS)
def test_bad_model_paths(mistake, mode, compressed, arguments, tmp_path, bad):
    make, word = BAD_PATHS[mistake]
    path = make(shutil.copytree(compressed, tmp_path / "copy"))
    bad(arguments(mode, model_path=path, save_path=tmp_path / "new"), word)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("mode", ["pifa", "ppl", "generate"])
def test_a_transformers_folder_is_no_checkpoint(mode, model_folder, arguments, bad):
    bad(arguments(mode, model_path=model_folder), "is not a checkpoint of this tool")


def test_pifa_wants_a_low_rank_checkpoint(pivoted, arguments, tmp_path, bad):
    bad(arguments("pifa", model_path=pivoted, save_path=tmp_path), "is pivoted already")
    bad(arguments("pifa", model_path="original", save_path=tmp_path), "not the original model")
    bad(arguments("pifa", save_path=tmp_path), "no finished lowrank checkpoint under")
    bad(arguments("pifa", save_path=pivoted.parent), "no finished lowrank checkpoint under")


@pytest.mark.parametrize("mode", ["m", "pifa"])
@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_save_path_that_is_a_file(place, mode, compressed, arguments, tmp_path, bad):
    (tmp_path / "file").write_text("mine")
    bad(arguments(mode, model_path=compressed, save_path=tmp_path / place), "choose another --save_path")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("mode", ["m", "pifa"])
def test_a_save_path_that_takes_no_files(mode, compressed, arguments, tmp_path, bad, monkeypatch):
    monkeypatch.setattr("utils.checkpoint._accepts_files", lambda folder: False)
    bad(arguments(mode, model_path=compressed, save_path=tmp_path / "new"), "choose another --save_path")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("mode", ["m", "pifa"])
def test_an_existing_target_is_refused_before_the_work(mode, compressed, arguments, tmp_path, good, bad, monkeypatch):
    command = arguments(mode, model_path=None if mode == "m" else compressed, save_path=tmp_path)
    record = good(command)
    before = tiny.contents(Path(record["path"]))
    monkeypatch.setattr(component.compress, "compress_layers", pytest.fail)
    bad(command, "nothing is ever overwritten: --resume")
    assert good([*command, "--resume"]) == record
    assert tiny.contents(Path(record["path"])) == before


# ---------------------------------------------------------------- help and records


def test_help_tells_every_flag(capsys):
    with pytest.raises(SystemExit) as ended:
        PIFA.main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    flags = """mode model model_path save_path prefix resume overall_ratio density attn_ratio allocation use_pifa prune
        reconstruct_step old_output_factor pruning_nsamples reconstruct_nsamples seed dataset model_seq_len
        eval_batch_size eval_nsamples DEV dtype"""
    assert [flag for flag in flags.split() if f"--{flag} " not in text and f"--{flag}," not in text] == []


def test_it_runs_as_a_script_from_anywhere(tmp_path):
    command = [sys.executable, REPOSITORY / "PIFA.py", "--mode", "compress"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines() == ["PIFA.py: unknown --mode compress: use one of m, pifa, ppl, generate"]


IN_EVERY_RECORD = {"mode", "command", "model", "dataset", "dtype", "seed", "seconds", "peak_memory_gib"}
DENSITIES = {"density", "density_asked", "density_pivoted", "density_model"}
RECORDS = {
    "m": {"path", "ranks", *DENSITIES},
    "pifa": {"path", "ranks", *DENSITIES},
    "ppl": {"ppl", "tokens", "windows", "density"},
    "generate": {"text", "density"},
}


def test_three_modes_in_a_row_find_each_others_results(arguments, text_file, model_folder, tmp_path, good):
    """--model_path left out: pifa takes the newest low-rank checkpoint, ppl and generate the newest of any kind."""
    records = {mode: good(arguments(mode, save_path=tmp_path, max_new_tokens=3)) for mode in RECORDS}
    for mode, record in records.items():
        assert record.keys() >= IN_EVERY_RECORD | RECORDS[mode]
        assert record["mode"] == mode and record["model"] == str(model_folder)
        assert record["command"].startswith(f"python PIFA.py --mode {mode} ")
        assert (record["dtype"], record["seed"]) == ("float32", 3)
        assert record["seconds"] >= 0 and record["peak_memory_gib"] > 0
    assert records["m"]["dataset"] == records["ppl"]["dataset"] == str(text_file)
    assert records["pifa"]["source"] == records["m"]["path"]
    assert records["ppl"]["path"] == records["generate"]["path"] == records["pifa"]["path"]
    assert records["pifa"]["path"] == records["m"]["path"] + "-pifa"
    assert records["ppl"]["density"] == records["pifa"]["density"]
    assert records["ppl"]["tokens"] == 32 * records["ppl"]["windows"]
    for mode in ("m", "pifa"):
        assert json.loads((Path(records[mode]["path"]) / "pifa.json").read_text()) == records[mode]


def test_the_default_density_is_that_of_a_ratio_of_a_fifth(arguments, tmp_path, good):
    record = good(arguments("m", save_path=tmp_path))
    assert (record["density_asked"], record["overall_ratio"]) == (0.8, 0.2)
    assert record["density_pivoted"] <= 0.8


@pytest.mark.parametrize("density", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("use_pifa", [True, False])
def test_densities_are_counted_from_the_disk_and_never_above_what_was_asked(
    use_pifa, density, arguments, tmp_path, good
):
    flag = {} if use_pifa else {"no-use_pifa": True}
    low_rank = good(arguments("m", save_path=tmp_path, density=density, **flag))
    pivots = good(arguments("pifa", save_path=tmp_path))
    dense = sum(t.numel() for name, t in tiny.build().named_parameters() if "layers" in name and "proj" in name)
    for record in (low_rank, pivots):
        stored = tiny.stored_tensors(Path(record["path"]))
        counted = sum(tensor.numel() for name, tensor in stored.items() if "layers" in name and "proj" in name)
        assert record["density"] == pytest.approx(counted / dense, abs=1e-12)
        assert record["density_asked"] == density
    assert pivots["density"] == low_rank["density_pivoted"] == pivots["density_pivoted"]
    assert (low_rank["density_pivoted"] if use_pifa else low_rank["density"]) <= density


@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_density_is_the_ratio_the_other_way_round(ratio, arguments, tmp_path, good):
    removed = good(arguments("m", save_path=tmp_path / "a", overall_ratio=ratio))
    kept = good(arguments("m", save_path=tmp_path / "b", density=1 - ratio))
    assert tiny.contents(Path(removed["path"]), ("pifa.json",)) == tiny.contents(Path(kept["path"]), ("pifa.json",))


def test_attn_ratio_selects_type(arguments, tmp_path, good):
    record = good(arguments("m", save_path=tmp_path, overall_ratio=0.4, attn_ratio=0.6))
    assert record["allocation"] == "type" and "_type_" in Path(record["path"]).name
    uniform = good(arguments("m", save_path=tmp_path, overall_ratio=0.4))["ranks"]
    smaller = [name for name, rank in record["ranks"].items() if rank < uniform[name]]
    assert sorted(smaller) == sorted(name for name in uniform if "self_attn" in name)
    assert 0.55 < record["density_pivoted"] <= 0.6


def test_density_one_changes_nothing(arguments, model_folder, tmp_path, good):
    record = good(arguments("m", save_path=tmp_path, density=1.0))
    assert record["density"] == record["density_model"] == 1.0 and set(record["ranks"].values()) == {None}
    compressed = good(arguments("ppl", save_path=tmp_path))["ppl"]
    assert compressed == good(arguments("ppl", model_path="original"))["ppl"]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("float16", 5e-3), ("bfloat16", 5e-2)])
@pytest.mark.parametrize("density", [0.4, 0.8])
def test_pivoting_keeps_the_perplexity(density, dtype, tolerance, arguments, tmp_path, good):
    good(arguments("m", save_path=tmp_path, density=density, dtype=dtype))
    before = good(arguments("ppl", save_path=tmp_path))
    good(arguments("pifa", save_path=tmp_path))
    after = good(arguments("ppl", save_path=tmp_path))
    assert before["dtype"] == after["dtype"] == dtype
    assert before["path"] != after["path"]
    assert after["ppl"] == pytest.approx(before["ppl"], rel=tolerance)


def test_several_texts_are_evaluated_in_one_go(arguments, text_file, tmp_path, good):
    other = tmp_path / "other.txt"
    other.write_text(tiny.text(1200)[4000:])
    record = good(arguments("ppl", model_path="original", dataset=[text_file, other], eval_nsamples=5))
    alone = [good(arguments("ppl", model_path="original", dataset=d, eval_nsamples=5)) for d in (text_file, other)]
    assert record["ppls"] == {str(text_file): alone[0]["ppl"], str(other): alone[1]["ppl"]}
    assert record["ppl"] == alone[0]["ppl"] != alone[1]["ppl"]
    assert (record["windows"], record["density"], record["path"]) == (5, 1.0, "original")


@pytest.mark.parametrize("mode", ["m", "ppl"])
def test_the_offline_default_is_said_and_recorded(mode, arguments, tmp_path, good, monkeypatch, caplog):
    monkeypatch.setattr(data, "hub_reachable", lambda: False)
    monkeypatch.setattr(data, "_cached", lambda name: False)
    path = "original" if mode == "ppl" else None
    record = good(arguments(mode, dataset=None, model_path=path, save_path=tmp_path, eval_nsamples=2))
    assert record["dataset"] == "pydoc"
    assert any("using pydoc instead" in message for message in caplog.messages)


def test_defaults_on_a_cpu_are_said(arguments, caplog):
    flags = dict.fromkeys(["pruning_nsamples", "reconstruct_nsamples", "model_seq_len"])
    options = PIFA.parse(arguments("m", **flags))
    assert (options.pruning_nsamples, options.reconstruct_nsamples, options.model_seq_len) == (16, 16, 512)
    caplog.set_level("INFO", logger="pifa")
    PIFA.parse(arguments("m", **flags))
    assert sum("on CPU --" in message for message in caplog.messages) == 3


# ---------------------------------------------------------------- poor data and poor models

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
