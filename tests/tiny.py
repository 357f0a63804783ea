"""Models, tokenizers and texts small enough for a test: random weights from a fixed seed, nothing downloaded."""

import importlib.util
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import PIFA
from component.compress.settings import Settings
from component.modes import m
from utils.whole_files import sha256

GPU = torch.cuda.is_available()
INTERPRETED = not GPU and os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not (GPU or INTERPRETED), reason="needs a GPU, or triton and TRITON_INTERPRET=1")

BYTES = 256
EOS = BYTES  # the one token that is no byte
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": BYTES + 8,
    "max_position_embeddings": 256,
    "bos_token_id": EOS,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
}
# name -> model type, what differs from SHAPE; windows in the tests are longer than the sliding windows
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_key_value_heads": 4}),
    "llama-gqa": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 8}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "phi3": ("phi3", {}),
    "gemma2": ("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
}
ATTENTION = [(family, kind) for family in FAMILIES for kind in ("sdpa", "eager")]
ATTENTION.remove(("gemma2", "sdpa"))  # transformers knows no sdpa for its capped scores


def build(family: str = "llama-gqa", attention: str | None = None, seed: int = 0, **changes: Any) -> nn.Module:
    """A random model of a family, in eval mode; biases and norms are random too, so that losing one shows."""
    kind, differences = FAMILIES[family]
    config = AutoConfig.for_model(kind, **{**SHAPE, **differences, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if parameter.dim() == 1:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
    return model.eval().requires_grad_(False)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and <eos>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)} | {"<eos>": EOS}
    inner = Tokenizer(tokenizer_models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")


def save_model(folder: Path, model: nn.Module) -> Path:
    """A transformers folder, as --model takes it."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def text(words: int = 1000) -> str:
    """Random words of random letters."""
    draw = random.Random(0)
    return " ".join("".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(words))


def token_windows(count: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, BYTES, (count, length), generator=torch.Generator().manual_seed(seed))


def rand(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram_of(x: Tensor) -> Tensor:
    """x x^T for x: (d_in, tokens)."""
    return x @ x.T


def relative(found: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`."""
    return ((found - expected).norm() / expected.norm()).item()


def flags(mode: str, **options: Any) -> list[str]:
    """A command line: None leaves a flag out, True gives it without a value, a list with several."""
    argv = ["--mode", mode]
    for name, value in options.items():
        if value is None or value is False:
            continue
        values = value if isinstance(value, list) else [] if value is True else [value]
        argv += [f"--{name}", *map(str, values)]
    return argv


def settings(**options: Any) -> Settings:
    """Those of --mode m on a CPU with these flags."""
    return m.settings_of(PIFA.parse(flags("m", **{"DEV": "cpu", **options})))


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, read from its safetensors."""
    return {name: t for shard in sorted(folder.glob("*.safetensors")) for name, t in load_file(shard).items()}


def contents(folder: Path, without: tuple[str, ...] = ()) -> dict[str, str]:
    """Name -> hash of every file in a folder: where two folders differ, a failure says which file and no more."""
    paths = [path for path in sorted(folder.iterdir()) if path.name not in without]
    return {path.name: sha256(path) for path in paths}


def edit_json(path: Path, change) -> None:
    """Read, let `change` alter the value in place, write."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
