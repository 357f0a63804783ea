"""utils/models.py: models of all sources, and their errors."""

import pytest
import torch

from tests import tiny
from utils import models, sources
from utils.errors import UsageError


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_saved_folder_is_read_back(family, tmp_path):
    model, windows = tiny.build(family), tiny.token_windows(2, 16)
    source = sources.find_source(str(tiny.save_model(tmp_path / "saved", model)))
    assert source.name == "saved"
    loaded = models.load_model(source, torch.float32)
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    with torch.no_grad():
        assert torch.equal(loaded(windows).logits, model(windows).logits)


def test_the_tokenizer_of_a_saved_folder_is_read_back(model_folder):
    tokenizer = models.load_tokenizer(sources.find_source(str(model_folder)))
    assert tokenizer.decode(tokenizer("två words")["input_ids"]) == "två words"


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
        source = sources.find_source(str(folder))
        models.load_config(source)
        models.load_model(source, torch.float32)


def test_a_compressed_model_is_no_original(compressed):
    with pytest.raises(UsageError, match="compressed already"):
        models.load_config(sources.find_source(str(compressed)))


@pytest.mark.parametrize(("device", "expected"), [("cpu", "float32"), ("cuda", "bfloat16")])
def test_default_dtype(device, expected, tmp_path):
    source = sources.find_source(str(tiny.save_model(tmp_path / "half", tiny.build().to(torch.bfloat16))))
    config = models.load_config(source)
    assert models.default_dtype_name(source, config, torch.device(device)) == expected
