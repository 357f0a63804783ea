"""utils/source_weights.py: layers read one at a time are those of the model loaded whole, and never two at once."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

import component.compress.folder
import PIFA
from component.checkpoint import reading as files
from component.flow.streaming import compress_layers
from tests import tiny
from utils import models, sources
from utils.errors import UsageError
from utils.gguf_weights import halves_apart
from utils.layers import HeldLayers, decoder_layers, describe_layers
from utils.source_weights import ReadLayers, open_model

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)


def opened(folder: Path, dtype: torch.dtype = torch.float32):
    return open_model(sources.find_source(str(folder)), dtype)


def state_of(model: nn.Module, layers) -> dict[str, torch.Tensor]:
    """Every tensor of the model, non-persistent buffers included; its layers filled one by one."""
    found = {}
    names = [name for name, _ in decoder_layers(model)]
    for name in names:
        with layers.filled(name, CPU) as layer:
            # copies, as they are gone afterwards
            found |= {f"{name}.{key}": t.clone() for key, t in (*layer.named_parameters(), *layer.named_buffers())}
    rest = (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    return found | {key: t for key, t in rest if not key.startswith(tuple(f"{name}." for name in names))}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_layers_read_one_by_one_are_those_of_the_model_loaded_whole(family, dtype, tmp_path):
    folder = tiny.save_model(tmp_path / "model", tiny.build(family))
    model, layers = opened(folder, dtype)
    whole = models.load_model(sources.find_source(str(folder)), dtype)
    assert isinstance(layers, ReadLayers) and not model.training
    found, expected = state_of(model, layers), state_of(whole, HeldLayers(whole))
    assert found.keys() == expected.keys()
    assert all(t.dtype == expected[key].dtype and torch.equal(t, expected[key]) for key, t in found.items())
    assert not any(t.requires_grad for t in found.values())
    assert describe_layers(model, layers) == describe_layers(whole)
    assert (layers.now, layers.most) == (0, 1)
    assert model.config.to_dict() == whole.config.to_dict()
    assert model.generation_config == whole.generation_config


def test_between_uses_layers_have_no_weights_even_after_an_error(model_folder):
    model, layers = opened(model_folder)
    (name, layer), _ = decoder_layers(model)
    with pytest.raises(ZeroDivisionError), layers.filled(name, CPU) as filled:
        assert filled is layer and not any(t.is_meta for t in layer.parameters())
        _ = 1 / 0
    assert all(t.is_meta for _, one in decoder_layers(model) for t in one.parameters())
    assert not any(t.is_meta for key, t in model.named_parameters() if ".layers." not in key)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def sharded(folder: Path, original: Path) -> Path:
    """The same model in several files with an index."""
    model = models.load_model(sources.find_source(str(original)), torch.float32)
    model.save_pretrained(folder, max_shard_size="100KB")
    tiny.tokenizer().save_pretrained(folder)
    assert len(set(json.loads((folder / files.INDEX).read_text())["weight_map"].values())) > 2
    return folder


def test_an_index_of_several_files_is_followed(model_folder, tmp_path):
    model, layers = opened(sharded(tmp_path / "sharded", model_folder))
    whole, held = opened(model_folder)
    assert isinstance(layers, ReadLayers)
    expected = state_of(whole, held)
    assert all(torch.equal(t, expected[key]) for key, t in state_of(model, layers).items())


@pytest.mark.parametrize("changes", [{}, {"allocation": "uniform", "output_shrinkage": 1, "token_power": 0}])
def test_a_run_holds_one_layer_at_a_time_and_writes_the_same_bytes(changes, arguments, tmp_path, monkeypatch):
    """With two passes where there is a profile: through profile, draft, second profile and compression."""
    given = {"density": 0.6, **changes, **({} if changes else {"passes": 2})}
    seen = []

    def watched(*arguments):
        model, layers = open_model(*arguments)
        seen.append(layers)
        return model, layers

    def whole(source, dtype):
        model = models.load_model(source, dtype)
        return model, HeldLayers(model)

    folders = []
    for how in (watched, whole):
        monkeypatch.setattr(component.compress.folder, "open_model", how)
        folders.append(Path(PIFA.run(arguments("m", save_path=tmp_path / how.__name__, **given))["path"]))
    assert [(type(layers), layers.now, layers.most) for layers in seen] == [(ReadLayers, 0, 1)]
    read, held = (tiny.contents(folder, (files.RECORD,)) for folder in folders)
    assert read == held


def test_a_driver_that_is_left_half_way_empties_its_layer(model_folder):
    from component.flow.means import Flows, Means
    from component.flow.streaming import Compression
    from component.ranks.sizes import Rank
    from component.solve.solvers import make_solver

    model, layers = opened(model_folder)
    described = describe_layers(model, layers)
    plan = {f"{layer.name}.{name}": Rank(4) for layer in described for name in layer.linears()}
    flows = Flows(tiny.token_windows(4, 16), whitening=4, reconstruction=4)
    compression = Compression(plan, make_solver("svd", 0, mix_ratio=0.25), dtype=torch.float32)

    def finished(index: int, layer: nn.Module) -> bool:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        walk = {"flows": flows, "means": Means(CPU, layers), "finished": finished}
        next(compress_layers(model, described, compression, **walk))
    assert layers.now == 0


# ---------------------------------------------------------------- what is not one to one is loaded whole


def rewritten(folder: Path, change) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({key: t.contiguous() for key, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def bare_names(tensors: dict) -> None:
    """As a model without its head is saved: `layers.0...`, which the library maps."""
    for key in list(tensors):
        if key.startswith("model."):
            tensors[key.removeprefix("model.")] = tensors.pop(key)


def test_other_names_are_loaded_whole_and_said(model_folder, tmp_path, caplog):
    caplog.set_level("INFO", logger="pifa")
    folder = rewritten(tiny.save_model(tmp_path / "bare", tiny.build()), bare_names)
    model, layers = opened(folder)
    assert isinstance(layers, HeldLayers)
    assert "the model is loaded whole: model.embed_tokens.weight is stored 0 times" in caplog.text
    expected = tiny.build().state_dict()
    assert all(torch.equal(t, expected[key]) for key, t in model.state_dict().items())


def test_experts_that_the_library_fuses_are_loaded_whole(tmp_path, caplog):
    caplog.set_level("INFO", logger="pifa")
    shape = {**tiny.SHAPE, "num_local_experts": 2, "num_experts_per_tok": 1}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **shape))
    model.save_pretrained(tmp_path)
    loaded, layers = opened(tmp_path)
    assert isinstance(layers, HeldLayers) and "loaded whole: " in caplog.text
    expected = model.state_dict()
    assert all(torch.equal(t, expected[key]) for key, t in loaded.state_dict().items())


def test_a_tied_weight_that_is_stored_twice_is_loaded_whole(tmp_path, caplog):
    caplog.set_level("INFO", logger="pifa")
    folder = rewritten(
        tiny.save_model(tmp_path / "twice", tiny.build()),
        lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}),
    )
    _, layers = opened(folder)
    assert isinstance(layers, HeldLayers) and "is stored 2 times" in caplog.text


@pytest.mark.parametrize("harm", ["missing", "other shape"])
def test_what_can_not_be_loaded_whole_either_is_refused(harm, tmp_path):
    key = "model.layers.1.mlp.up_proj.weight"

    def change(tensors: dict) -> None:
        tensor = tensors.pop(key)
        if harm == "other shape":
            tensors[key] = tensor.T.clone()

    folder = rewritten(tiny.save_model(tmp_path / "broken", tiny.build()), change)
    with pytest.raises(UsageError, match="does not hold every weight"):
        opened(folder)


# ---------------------------------------------------------------- GGUF


def test_rows_of_heads_are_put_back_in_order():
    weight = tiny.rand(2 * 8, 3)
    stored = weight.reshape(2, 2, 4, 3).transpose(1, 2).reshape(16, 3)  # as llama.cpp converts
    assert not torch.equal(stored, weight)
    assert torch.equal(halves_apart(stored, 2), weight)


def test_the_layers_of_a_gguf_file_are_those_of_the_model_loaded_whole():
    source = sources.find_source("smollm2")
    model, layers = open_model(source, torch.float32)
    assert isinstance(layers, ReadLayers)
    arguments = {**source.arguments, "quantization_config": GgufConfig(dequantize=True)}
    whole = AutoModelForCausalLM.from_pretrained(source.location, dtype=torch.float32, **arguments)
    found, expected = state_of(model, layers), state_of(whole, HeldLayers(whole))
    assert found.keys() == expected.keys()
    assert all(torch.equal(t, expected[key]) for key, t in found.items())
    assert layers.most == 1
    assert model.config.to_dict() == whole.config.to_dict()
    assert model.generation_config == whole.generation_config
