"""component/checkpoint/export.py and utils/gguf_writer.py: the exported model computes what the checkpoint computes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers import models as tokenizer_models
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import PIFA
from tests import tiny
from utils import gguf_writer as gguf_model
from utils.errors import UsageError
from utils.gguf_writer import interleaved, rope_factors, vocabulary_of

PROMPT = tiny.token_windows(2, 24)
TEXT = "It's 12345 words, isn't it?  Two  spaces,\nand a line: caf\u00e9 \u4e2d\u6587 \U0001f600!"


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(PROMPT, use_cache=False).logits


def loaded(folder, **more):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more).eval()


def with_merges(folder: Path) -> Path:
    """Give the folder a tokenizer that merges."""
    byte_level().save_pretrained(folder)
    return folder


def from_gguf(path: Path):
    """By the library's own reader."""
    return loaded(path.parent, gguf_file=path.name)


@pytest.fixture(scope="module")
def folded(arguments, compressed, tmp_path_factory) -> Path:
    parent = tmp_path_factory.mktemp("folded")
    return Path(PIFA.run(arguments("pifa", model_path=compressed, save_path=parent, fold=True))["path"])


@pytest.mark.parametrize("kind", ["compressed", "pivoted", "folded"])
def test_the_dense_folder_is_the_same_function_for_everybody(kind, request, arguments, tmp_path, good):
    folder = request.getfixturevalue(kind)
    record = good(arguments("export", model_path=folder, save_path=tmp_path))
    target = Path(record["path"])
    assert target == tmp_path / f"{folder.name}-dense" and record["format"] == "transformers"
    assert record["bytes"] == sum(path.stat().st_size for path in target.iterdir())
    assert tiny.relative(logits(loaded(target)), logits(loaded(folder))) < 1e-5
    config = json.loads((target / "config.json").read_text())
    assert "quantization_config" not in config and "auto_map" not in config
    assert AutoTokenizer.from_pretrained(target)(TEXT) == AutoTokenizer.from_pretrained(folder)(TEXT)
    # where this repository is absent
    script = "import sys, transformers as t; print(type(t.AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)"
    result = subprocess.run([sys.executable, "-c", script, target], cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (0, "LlamaForCausalLM"), result.stderr


@pytest.mark.parametrize("family", ["qwen2", "phi3", "opt"])
def test_other_families_and_biases(family, arguments, tmp_path, good):
    original = tiny.save_model(tmp_path / "original", tiny.build(family))
    folder = good(arguments("m", model=original, density=0.6, save_path=tmp_path))["path"]
    record = good(arguments("export", model_path=folder, save_path=tmp_path))
    assert tiny.relative(logits(loaded(record["path"])), logits(loaded(folder))) < 1e-5


def test_the_exported_folder_can_be_compressed_again(compressed, arguments, tmp_path, good):
    dense = good(arguments("export", model_path=compressed, save_path=tmp_path))["path"]
    assert good(arguments("m", model=dense, density=0.5, save_path=tmp_path))["density_pivoted"] <= 0.5


@pytest.mark.parametrize("form", ["transformers", "gguf"])
def test_nothing_is_overwritten_and_a_failure_leaves_nothing(
    form, compressed, arguments, tmp_path, good, bad, monkeypatch
):
    compressed = with_merges(shutil.copytree(compressed, tmp_path / "copy"))
    command = arguments("export", model_path=compressed, save_path=tmp_path / "a", format=form)
    target = Path(good(command)["path"])
    before = target.read_bytes() if form == "gguf" else tiny.contents(target)
    bad(command, "nothing is ever overwritten")
    assert before == (target.read_bytes() if form == "gguf" else tiny.contents(target))

    def fail(*given, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_model, "write", fail)
    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", fail)
    with pytest.raises(KeyboardInterrupt):
        PIFA.main(arguments("export", model_path=compressed, save_path=tmp_path / "b", format=form))
    assert list((tmp_path / "b").iterdir()) == []


@pytest.mark.parametrize("kind", ["compressed", "folded"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_gguf_there_and_back(kind, dtype, request, arguments, tmp_path, good):
    folder = with_merges(shutil.copytree(request.getfixturevalue(kind), tmp_path / "copy"))
    record = good(arguments("export", model_path=folder, save_path=tmp_path, format="gguf", dtype=dtype))
    path = Path(record["path"])
    assert path == tmp_path / f"{folder.name}.gguf" and record["bytes"] == path.stat().st_size
    back, original = from_gguf(path), loaded(folder)
    assert tiny.relative(logits(back), logits(original)) < (1e-5 if dtype == "float32" else 5e-3)
    for name in ("max_position_embeddings", "num_key_value_heads", "rms_norm_eps", "vocab_size"):
        assert getattr(back.config, name) == pytest.approx(getattr(original.config, name))
    assert back.config.tie_word_embeddings == original.config.tie_word_embeddings
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert tokenizer(TEXT)["input_ids"] == byte_level()(TEXT)["input_ids"]
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>") and back.config.eos_token_id == 261


CHANGES = {
    "untied, one key per query": {"num_key_value_heads": 4, "tie_word_embeddings": False},
    "another head size": {"head_dim": 32},
    "another base of angles": {"rope_theta": 500000.0},
}


@pytest.mark.parametrize("changes", CHANGES)
def test_gguf_of_other_llamas(changes, arguments, tmp_path, good):
    model = tiny.build("llama", **CHANGES[changes])
    original = with_merges(tiny.save_model(tmp_path / "original", model))
    command = arguments("export", model=original, model_path="original", save_path=tmp_path, format="gguf")
    assert tiny.relative(logits(from_gguf(Path(good(command)["path"]))), logits(model)) < 1e-5


def test_a_large_weight_does_not_become_infinite(arguments, tmp_path, bad):
    model = tiny.build()
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = 1e6
    original = with_merges(tiny.save_model(tmp_path / "original", model))
    command = {"model": original, "model_path": "original", "save_path": tmp_path, "format": "gguf"}
    bad(arguments("export", **command, dtype="float16"), "does not fit float16", code=1)
    assert not list(tmp_path.glob("*.gguf"))


def test_rotation_by_neighbours_is_rotation_by_halves():
    """A head of 6: channel i and i + 3 turn together; after it they stand side by side."""
    rows = torch.arange(12.0)[:, None]
    assert interleaved(rows, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("scaling", SCALINGS)
def test_scaled_angles_become_factors(scaling):
    model = tiny.build("llama", rope_parameters={"rope_theta": 10000.0, **SCALINGS[scaling]})
    factors = rope_factors(model, 10000.0, 16)
    if scaling == "default":
        assert factors is None
    else:
        plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
        torch.testing.assert_close(plain / factors, model.model.rotary_emb.inv_freq, rtol=1e-5, atol=0)
        assert factors.max() == pytest.approx(SCALINGS[scaling]["factor"])


REFUSED = {
    "another family": ("qwen2", {}, "is for the LLaMA architecture, not qwen2"),
    "another activation": ("llama", {"hidden_act": "gelu"}, "has SiLU in its MLP"),
    "angles that depend on the length": (
        "llama", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0}}, "of type dynamic",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", REFUSED)
def test_models_without_a_faithful_form_are_refused(mistake, arguments, tmp_path, bad):
    family, changes, word = REFUSED[mistake]
    original = tiny.save_model(tmp_path / "original", tiny.build(family, **changes))
    bad(arguments("export", model=original, model_path="original", save_path=tmp_path / "new", format="gguf"), word)
    assert not (tmp_path / "new").exists()


def test_bfloat16_is_not_written_where_asked_for(compressed, arguments, tmp_path, bad):
    bad(arguments("export", model_path=compressed, save_path=tmp_path, format="gguf", dtype="bfloat16"), "bfloat16")
    bad(arguments("export", model_path=compressed, save_path=tmp_path, format="onnx"), "unknown --format onnx")


# ---------------------------------------------------------------- tokenizers

MERGES = [("t", "h"), ("th", "e"), ("\u0120", "the"), ("1", "2")]


def byte_level(pre=None, merges=MERGES, special=("<s>", "</s>"), **model) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    for token in special:
        vocabulary[token] = len(vocabulary)
    inner = Tokenizer(tokenizer_models.BPE(vocab=vocabulary, merges=merges, **model))
    inner.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def with_digits():
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])


def with_split(pattern: str):
    from tokenizers import Regex

    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def sentencepiece(metaspace: bool, merges, **model) -> PreTrainedTokenizerFast:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abcdefgh"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    inner = Tokenizer(
        tokenizer_models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    if metaspace:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    else:
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(parts)
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize(
    ("pre", "cut", "words_first"),
    [
        (None, "gpt-2", False),
        (with_digits(), "smollm", False),
        (with_split(gguf_model.LLAMA3_SPLIT), "llama-bpe", True),
    ],
)
def test_byte_level_tokenizers_are_named(pre, cut, words_first):
    words = vocabulary_of(byte_level(pre, ignore_merges=words_first), 300)
    assert (words.model, words.cut, words.add_bos, words.add_eos) == ("gpt2", cut, False, False)
    assert words.merges == ["t h", "th e", "\u0120 the", "1 2"] and len(words.tokens) == len(words.types) == 300
    assert words.tokens[256:263] == ["th", "the", "\u0120the", "12", "<s>", "</s>", "[PAD262]"]
    assert words.types[256:263] == [1, 1, 1, 1, 3, 3, 5] and words.special == {"bos": 260, "eos": 261}


BAD_TOKENIZERS = {
    "a prefix space": (lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)), "cuts text by ByteLevel"),
    "another expression": (lambda: byte_level(with_split(r"\p{N}{1,2}")), "no name for"),
    "words before merges": (lambda: byte_level(ignore_merges=True), "ignore_merges is True"),
    "nothing to merge": (lambda: byte_level(merges=[]), "has no merges"),
    "a suffix": (lambda: byte_level(end_of_word_suffix="e", merges=[]), "end_of_word_suffix"),
    "more tokens than embeddings": (lambda: byte_level(merges=[("a", "b")] + [("b", "c")] * 0), "no row"),
    "pairs that it does not merge": (
        lambda: sentencepiece(True, [("a", "b"), ("ab", "c"), ("b", "c")]), "would merge pairs",
    ),
    "no order by token": (
        lambda: sentencepiece(True, [("a", "b"), ("b", "c"), ("ab", "c"), ("d", "e"), ("a", "bc")]),
        "no order by token",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", BAD_TOKENIZERS)
def test_tokenizers_without_a_faithful_form_are_refused(mistake):
    make, word = BAD_TOKENIZERS[mistake]
    with pytest.raises(UsageError, match=word):
        vocabulary_of(make(), 258 if "embeddings" in mistake else 400)


def test_text_that_is_changed_before_it_is_cut_is_refused():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    with pytest.raises(UsageError, match="changes text"):
        vocabulary_of(tokenizer, 300)


def test_word_pieces_are_refused():
    inner = Tokenizer(tokenizer_models.WordPiece(vocab={"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(UsageError, match="WordPiece is not BPE"):
        vocabulary_of(PreTrainedTokenizerFast(tokenizer_object=inner), 10)


@pytest.mark.parametrize("metaspace", [False, True])
@pytest.mark.parametrize("template", [None, "{{ messages[0]['content'] }}"])
def test_sentencepiece_there_and_back(metaspace, template, arguments, tmp_path, good):
    """Both halves of abc are tokens, so both cuts are merges; merges in the file's order by transformers too."""
    merges = [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc"), ("\u2581", "a"), ("\u2581", "ab"), ("\u2581a", "b")]
    tokenizer = sentencepiece(metaspace, merges)
    tokenizer.chat_template = template
    model = tiny.build("llama", vocab_size=320, bos_token_id=1, eos_token_id=2, pad_token_id=None)
    model.save_pretrained(tmp_path / "original")
    tokenizer.save_pretrained(tmp_path / "original")
    command = arguments("export", model=tmp_path / "original", model_path="original", save_path=tmp_path, format="gguf")
    path = Path(good(command)["path"])
    back = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in ("abc bcd ab  a", "a", "gabc", "caf\u00e9 x"):
        assert back(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert back.chat_template == template
    assert (back.bos_token, back.eos_token, back.unk_token) == ("<s>", "</s>", "<unk>")
    words = vocabulary_of(tokenizer, 320)
    assert (words.add_bos, words.add_eos, words.add_space) == (True, False, True)
    assert words.types[:4] == [2, 3, 3, 6]
    assert AutoConfig.from_pretrained(path.parent, gguf_file=path.name).vocab_size == 320
