"""A dense LLaMA and its tokenizer as one GGUF file, as llama.cpp reads it.

Names and metadata are those of llama.cpp's `llama` architecture (https://github.com/ggml-org/ggml/blob/master/docs/
gguf.md). What has no faithful form there is refused before the model is loaded.
"""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.errors import RunError, UsageError

ARCHITECTURES = ("llama",)  # model types of which llama.cpp's `llama` is the same function
STATIC_ROPE = ("default", "linear", "llama3")  # angles that do not depend on the length of the text
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # token types of the format
SPACE = "\u2581"  # sentencepiece's
# how text is cut before merging -> llama.cpp's name for it, and whether whole words go before merges
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CUTS = {
    (("ByteLevel", True),): ("gpt-2", False),
    (("Digits", True), ("ByteLevel", True)): ("smollm", False),
    (("Split", LLAMA3_SPLIT), ("ByteLevel", False)): ("llama-bpe", True),
}


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in GGUF's terms. model: `gpt2` for byte-level BPE, `llama` for sentencepiece's BPE.

    scores are for `llama`, cut and merges for `gpt2`. special: bos, eos, unk, pad -> id.
    """

    model: str
    tokens: list[str]
    types: list[int]
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    chat_template: str | None = None
    cut: str = "default"
    merges: list[str] | None = None
    scores: list[float] | None = None
    add_space: bool = False


def dtype_for(name: str, asked: bool) -> str:
    """float32 stays, bfloat16 becomes float16 unless it was asked for. Raises: UsageError for bfloat16 asked for."""
    if name == "bfloat16" and asked:
        raise UsageError("--format gguf is written as float16 or float32: bfloat16 is not for every llama.cpp machine")
    return "float16" if name == "bfloat16" else name


def check_config(config: Any) -> None:
    """Raises: UsageError for a model that llama.cpp's `llama` does not compute, or without the package gguf."""
    if importlib.util.find_spec("gguf") is None:
        raise UsageError("--format gguf needs the package gguf: pip install -r requirements.txt")
    if config.model_type not in ARCHITECTURES:
        raise UsageError(
            f"--format gguf is for the LLaMA architecture, not {config.model_type}: export a transformers folder "
            "and convert it with llama.cpp's own convert_hf_to_gguf.py"
        )
    if config.hidden_act != "silu":
        raise UsageError(f"--format gguf: llama.cpp's llama has SiLU in its MLP, and this model {config.hidden_act}")
    kind = _rope(config).get("rope_type", "default")
    if kind not in STATIC_ROPE:
        raise UsageError(f"--format gguf: rotary embeddings of type {kind} are not converted")


def _rope(config: Any) -> dict[str, Any]:
    """rope_parameters from transformers 5 on; before, rope_theta and rope_scaling."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return {"rope_theta": getattr(config, "rope_theta", None), **found}


# ---------------------------------------------------------------- the tokenizer


def vocabulary_of(tokenizer: Any, size: int) -> Vocabulary:
    """The tokenizer of a model with `size` embeddings. Raises: UsageError where llama.cpp would cut text otherwise."""
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if inner is None:
        raise _refused(f"{type(tokenizer).__name__} has no tokenizer.json form")
    whole = json.loads(inner.to_str())
    model = whole["model"]
    if model["type"] != "BPE":
        raise _refused(f"{model['type']} is not BPE")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise _refused(f"its BPE has a {name}")
    tokens, types = _tokens(whole, size)
    special = {
        name: found
        for name in ("bos", "eos", "unk", "pad")
        if (found := getattr(tokenizer, f"{name}_token_id")) is not None
    }
    add_bos, add_eos = _ends(tokenizer, special)
    shared = (tokens, types, special, add_bos, add_eos, _template(tokenizer))
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    if model.get("byte_fallback"):
        add_space = _sentencepiece_space(whole)
        for token, number in model["vocab"].items():
            if len(token) == 6 and token.startswith("<0x"):
                types[number] = BYTE
        if "unk" in special:
            types[special["unk"]] = UNKNOWN
        return Vocabulary("llama", *shared, scores=_scores(tokens, merges), add_space=add_space)
    if not merges:
        raise _refused("it has no merges")
    cut, words_first = _cut(whole)
    if bool(model.get("ignore_merges")) != words_first:
        raise _refused(f"ignore_merges is {bool(model.get('ignore_merges'))}, which {cut} is not")
    return Vocabulary("gpt2", *shared, cut=cut, merges=[" ".join(merge) for merge in merges])


def _refused(why: str) -> UsageError:
    return UsageError(
        f"--format gguf: the tokenizer has no faithful form in GGUF ({why}); export a transformers folder and convert "
        "it with llama.cpp's own convert_hf_to_gguf.py"
    )


def _tokens(whole: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Texts and types by id; ids without a token are filled up, as the embeddings have rows for them."""
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [UNUSED] * size
    found = [(number, token, NORMAL) for token, number in whole["model"]["vocab"].items()]
    found += [(a["id"], a["content"], CONTROL if a["special"] else USER_DEFINED) for a in whole["added_tokens"]]
    for number, token, kind in found:
        if number >= size:
            raise _refused(f"token {number} has no row in the embeddings")
        tokens[number], types[number] = token, kind
    return tokens, types


def _ends(tokenizer: Any, special: dict[str, int]) -> tuple[bool, bool]:
    """Whether a text gets a bos before and an eos behind it; anything else is refused."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for add_bos in (False, True):
        for add_eos in (False, True):
            before, behind = [special.get("bos")] * add_bos, [special.get("eos")] * add_eos
            if full == [*before, *bare, *behind]:
                return add_bos, add_eos
    raise _refused("it puts other tokens than bos and eos around a text")


def _template(tokenizer: Any) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    return template if isinstance(template, str) else None


def _steps(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """A pre-tokenizer or normalizer as the sequence that it is."""
    if part is None:
        return []
    return part[inner] if part["type"] == "Sequence" else [part]


def _cut(whole: dict[str, Any]) -> tuple[str, bool]:
    if whole["normalizer"] is not None:
        raise _refused("it changes text before cutting it")
    found: list[tuple[str, Any]] = []
    for step in _steps(whole["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            found.append(("ByteLevel", step["use_regex"]))
        elif step["type"] == "Digits":
            found.append(("Digits", step["individual_digits"]))
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            found.append(("Split", step["pattern"].get("Regex")))
        else:
            raise _refused(f"it cuts text by {step['type']}")
    if tuple(found) not in CUTS:
        raise _refused("it cuts text in a way that llama.cpp has no name for here")
    return CUTS[tuple(found)]


def _sentencepiece_space(whole: dict[str, Any]) -> bool:
    """Whether a text gets a space before it; all else about spaces must be sentencepiece's."""
    normalizers = _steps(whole["normalizer"], "normalizers")
    cutters = _steps(whole["pre_tokenizer"], "pretokenizers")
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepended = {"type": "Prepend", "prepend": SPACE}
    if not cutters and normalizers in ([prepended, replaced], [replaced]):
        return prepended in normalizers
    if not normalizers and len(cutters) == 1 and cutters[0]["type"] == "Metaspace":
        step = cutters[0]
        if step["replacement"] == SPACE and not step.get("split", True):
            return step["prepend_scheme"] != "never"
    raise _refused("its spaces are not sentencepiece's")


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """Scores under which sentencepiece merges in the order of the merges.

    It takes the pair whose union has the highest score, whatever its halves. So all merges into one token must stand
    together, and no pair of tokens with a token as its union may be missing.
    """
    scores = [0.0] * len(tokens)
    number_of = {token: number for number, token in enumerate(tokens)}
    done: set[str] = set()
    last = ""
    for left, right in merges:
        union = left + right
        if union != last and union in done:
            raise _refused("its merges have no order by token")
        done.add(union)
        last = union
        scores[number_of[union]] = -float(len(done))
    listed = {(left, right) for left, right in merges}
    for union in done:
        for cut in range(1, len(union)):
            halves = union[:cut], union[cut:]
            if halves not in listed and halves[0] in number_of and halves[1] in number_of:
                raise _refused("sentencepiece would merge pairs that it does not")
    return scores


# ---------------------------------------------------------------- the file


def write(path: Path, model: Any, words: Vocabulary, *, dtype: torch.dtype, name: str) -> None:
    """model: dense, in float32 on the CPU; matrices are written as `dtype`, vectors in float32.

    Raises: RunError where a weight does not fit float16.
    """
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    theta = float(_rope(config)["rope_theta"])
    writer.add_name(name)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(theta)
    writer.add_rope_dimension_count(head_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if dtype == torch.float16 else gguf.LlamaFileType.ALL_F32)
    _write_vocabulary(writer, words)

    factors = rope_factors(model, theta, head_size)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        found = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise RunError(f"{key} has no name in a GGUF file of a LLaMA")
        parts = key.split(".")
        if parts[-2] in ("q_proj", "k_proj"):
            tensor = interleaved(tensor, heads if parts[-2] == "q_proj" else key_heads)
        tensor = tensor.detach().to(dtype if tensor.dim() > 1 else torch.float32).contiguous()
        if not torch.isfinite(tensor).all():
            raise RunError(f"{key} does not fit float16: give --dtype float32")
        writer.add_tensor(found, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_vocabulary(writer: Any, words: Vocabulary) -> None:
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.cut)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    if words.scores is not None:
        writer.add_token_scores(words.scores)
        writer.add_add_space_prefix(words.add_space)
    if words.merges is not None:
        writer.add_token_merges(words.merges)
    for name, number in words.special.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(words.add_bos)
    writer.add_add_eos_token(words.add_eos)
    if words.chat_template:
        writer.add_chat_template(words.chat_template)


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection in the order of llama.cpp's rotation, which turns neighbours.

    transformers turns channel i of a head with channel i + size / 2. rows: (heads * size, ...).
    """
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def rope_factors(model: Any, theta: float, head_size: int) -> Tensor | None:
    """(size / 2,) float32, what plain rotary frequencies are divided by; None where the model's are plain."""
    frequencies = model.get_decoder().rotary_emb.inv_freq.float().cpu()
    plain = theta ** -(torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
    factors = plain / frequencies
    return None if torch.allclose(factors, torch.ones_like(factors), rtol=1e-4) else factors
