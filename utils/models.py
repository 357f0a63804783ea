"""Load a model, its config and its tokenizer, from wherever --model points."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import PreTrainedModel

from utils import names
from utils.errors import UsageError
from utils.gguf_file import Header, is_llama, llama_config, read_header
from utils.gguf_weights import load_llama
from utils.sources import Source
from utils.whole_files import sha256

DTYPES = {name: getattr(torch, name) for name in names.DTYPE_NAMES}


def load_config(source: Source) -> transformers.PretrainedConfig:
    """The source's config. Raises: UsageError where there is none, or the model is compressed already."""
    if header := _llama_header(source):
        return llama_config(header, source.location)
    with readable(source):
        config = transformers.AutoConfig.from_pretrained(source.location, **source.arguments)
    if (getattr(config, "quantization_config", None) or {}).get("quant_method") == "pifa":
        raise UsageError(f"{source.location} is compressed already: --model takes the original model")
    return config


def _llama_header(source: Source) -> Header | None:
    """Of a GGUF file of a LLaMA, which needs the library neither for its config nor for its weights."""
    if not source.gguf_path or _major() < 5:
        return None
    with readable(source):
        header = read_header(source.gguf_path)
    return header if is_llama(header) else None


def load_model(source: Source, dtype: torch.dtype) -> PreTrainedModel:
    """The model on the CPU, in eval mode, without gradients; GGUF blocks are dequantized.

    Raises: UsageError where it can't be read, or a weight is missing and would be a random one.
    """
    if source.gguf_path and _llama_header(source):
        with readable(source):
            return load_llama(source.gguf_path, load_config(source), dtype).eval().requires_grad_(False)
    arguments: dict[str, Any] = {**source.arguments, **dtype_argument(dtype)}
    if source.gguf_file:
        if hasattr(transformers, "GgufConfig"):  # transformers 5 keeps the blocks unless told otherwise
            arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    else:
        arguments["use_safetensors"] = True
    with readable(source):
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            source.location,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in info, and refused below
            **arguments,
        )
    model, info = loaded
    wrong = {kind: keys for kind, keys in info.items() if keys and kind != "unexpected_keys"}
    if wrong:
        raise UsageError(f"{source.location} does not hold every weight of its model: {wrong}")
    return model.eval().requires_grad_(False)


def default_dtype_name(source: Source, config: transformers.PretrainedConfig, device: torch.device) -> str:
    """float32 on the CPU and from GGUF, else what the source is stored in."""
    if device.type == "cpu" or source.gguf_file:
        return "float32"
    stored = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None) or torch.float32
    return str(stored).removeprefix("torch.")


def load_tokenizer(source: Source):
    with readable(source):
        if _llama_header(source):
            # what AutoTokenizer comes to, after reading the vocabulary once more for a config
            return transformers.PreTrainedTokenizerFast.from_pretrained(source.location, **source.arguments)
        return transformers.AutoTokenizer.from_pretrained(source.location, **source.arguments)


def fingerprint(source: Source) -> dict[str, Any]:
    """Names and sizes of a local model's files, so that a changed one is noticed; a hub model has its revision."""
    folder = Path(source.location)
    if source.gguf_file:
        return {source.gguf_file: sha256(folder / source.gguf_file)}
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}


def dtype_argument(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """from_pretrained's keyword: `dtype` from transformers 5 on, `torch_dtype` before."""
    return {"dtype" if _major() >= 5 else "torch_dtype": dtype}


def _major() -> int:
    return int(transformers.__version__.split(".")[0])


@contextlib.contextmanager
def readable(source: Source) -> Iterator[None]:
    """Turn the library's ways of not finding a model into one line."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise UsageError(f"cannot load model {source.location}: {first}") from error
