"""PIFA.py: models, checkpoints and results as folders; a wrong one is refused before the work, in one line."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

import component.checkpoint.writer
import component.compress.pipeline
from tests import tiny

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
    monkeypatch.setattr(component.checkpoint.writer, "_accepts_files", lambda folder: False)
    bad(arguments(mode, model_path=compressed, save_path=tmp_path / "new"), "choose another --save_path")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("mode", ["m", "pifa"])
def test_an_existing_target_is_refused_before_the_work(mode, compressed, arguments, tmp_path, good, bad, monkeypatch):
    command = arguments(mode, model_path=None if mode == "m" else compressed, save_path=tmp_path)
    record = good(command)
    before = tiny.contents(Path(record["path"]))
    monkeypatch.setattr(component.compress.pipeline, "compress_layers", pytest.fail)
    bad(command, "nothing is ever overwritten: --resume")
    assert good([*command, "--resume"]) == record
    assert tiny.contents(Path(record["path"])) == before


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
