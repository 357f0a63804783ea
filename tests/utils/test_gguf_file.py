"""utils/gguf_file.py: a header says what the gguf package reads of it, and a model is what transformers loads."""

from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests import tiny
from tests.modes.test_export import byte_level
from utils import gguf_writer as gguf_model
from utils import models, sources
from utils.errors import UsageError
from utils.gguf_file import is_llama, read_header
from utils.source_weights import open_model

VALUES = {
    "uint8": 200,
    "int8": -5,
    "uint16": 60000,
    "int16": -300,
    "uint32": 4 * 10**9,
    "int32": -(10**9),
    "float32": 0.1,
    "bool": True,
    "uint64": 2**63,
    "int64": -(2**40),
    "float64": 0.1,
    "string": "tv\u00e5 ord",
}
FORMS = {"untied": {"num_key_value_heads": 4, "tie_word_embeddings": False}, "tied": {"tie_word_embeddings": True}}


@pytest.fixture(scope="module")
def every_type(tmp_path_factory) -> Path:
    """A file with a value of every type, lists, and tensors of several types behind an alignment of its own."""
    path = tmp_path_factory.mktemp("gguf") / "types.gguf"
    writer = gguf.GGUFWriter(path, "somebody")
    writer.add_custom_alignment(64)
    for kind, value in VALUES.items():
        getattr(writer, f"add_{kind}")(f"value.{kind}", value)
    writer.add_array("list.texts", ["a", "", "\u00e5" * 9])
    writer.add_array("list.numbers", [1, 2, 3])
    writer.add_array("list.floats", [0.5, 0.25])
    writer.add_tensor("first", tiny.rand(3, 5).float().numpy())
    writer.add_tensor("second", tiny.rand(7).half().numpy())
    writer.add_tensor("third", gguf.quantize(tiny.rand(4, 64).float().numpy(), gguf.GGMLQuantizationType.Q8_0),
                      raw_dtype=gguf.GGMLQuantizationType.Q8_0)  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(params=FORMS)
def llama(request, tmp_path) -> sources.Source:
    """A GGUF file of a tiny model and a tokenizer that merges."""
    model, words = tiny.build("llama", **FORMS[request.param]), byte_level()
    path = tmp_path / "tiny.gguf"
    vocabulary = gguf_model.vocabulary_of(words, model.config.vocab_size)
    gguf_model.write(path, model, vocabulary, dtype=torch.float32, name="tiny")
    return sources.find_source(str(path))


def test_values_of_every_type(every_type):
    header = read_header(every_type)
    found = {key.removeprefix("value."): value for key, value in header.metadata.items() if key.startswith("value.")}
    assert found == {**VALUES, "float32": pytest.approx(0.1)}
    assert header.metadata["list.numbers"] == [1, 2, 3] and header.metadata["list.floats"] == [0.5, 0.25]
    assert header.metadata["list.texts"] == 3  # counted
    assert header.metadata["general.architecture"] == "somebody" and not is_llama(header)


def test_tensors_lie_where_the_gguf_package_finds_them(every_type):
    found = read_header(every_type).tensors
    expected = gguf.GGUFReader(every_type).tensors
    assert list(found) == [tensor.name for tensor in expected] == ["first", "second", "third"]
    for tensor in expected:
        stored = found[tensor.name]
        assert stored.shape == tuple(reversed(tensor.shape.tolist()))
        assert (stored.kind, stored.start) == (tensor.tensor_type, tensor.data_offset)


DAMAGE = {
    "another format": (lambda content: b"PK" + content[2:], "no GGUF file"),
    "version 1": (lambda content: content[:4] + b"\x01" + content[5:], "no GGUF file"),
    "the other byte order": (lambda content: content[:4] + content[7:3:-1] + content[8:], "no GGUF file"),
    "cut in a number": (lambda content: content[:20], "ends within its header"),
    "cut in a value": (lambda content: content[:100], "ends within its header|cannot load"),
    "nothing": (lambda content: b"", "cannot load"),
    "cut in the tensors": (lambda content: content[:-100], "cannot load"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused(damage, llama):
    change, word = DAMAGE[damage]
    llama.gguf_path.write_bytes(change(llama.gguf_path.read_bytes()))
    for load in (models.load_model, open_model):
        with pytest.raises(UsageError, match=word):
            load(llama, torch.float32)


def test_config_tokenizer_and_model_are_those_of_the_library(llama):
    where = {"pretrained_model_name_or_path": llama.location, "gguf_file": llama.gguf_file}
    assert models.load_config(llama).to_dict() == AutoConfig.from_pretrained(**where).to_dict()
    words, theirs = models.load_tokenizer(llama), AutoTokenizer.from_pretrained(**where)
    assert type(words) is type(theirs) and words.special_tokens_map == theirs.special_tokens_map
    assert words.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    model = models.load_model(llama, torch.float32)
    whole = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    state, expected = model.state_dict(), whole.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(t, expected[key]) for key, t in state.items())
    tied = model.config.tie_word_embeddings
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    windows = tiny.token_windows(2, 16)
    with torch.no_grad():
        assert torch.equal(model(windows).logits, whole(windows).logits)
    assert models.load_model(llama, torch.bfloat16).dtype == torch.bfloat16


def test_a_file_that_lacks_a_weight_is_refused(tmp_path):
    model = tiny.build("llama", **FORMS["untied"])
    words = gguf_model.vocabulary_of(byte_level(), model.config.vocab_size)
    model.model.norm.weight = None
    gguf_model.write(tmp_path / "tiny.gguf", model, words, dtype=torch.float32, name="tiny")
    with pytest.raises(UsageError, match=r"does not hold every weight.*model\.norm\.weight"):
        models.load_model(sources.find_source(str(tmp_path / "tiny.gguf")), torch.float32)
