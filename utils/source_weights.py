"""Decoder layers whose weights are read from the source when they are wanted, and dropped after use.

The drivers ask a `LayerSource` (layers.py) for one layer at a time and do not know whether the model is in memory whole
or its layers are shapes without numbers until then (`ReadLayers`).
"""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from utils.errors import UsageError
from utils.gguf_file import is_llama, read_header
from utils.gguf_weights import GGUFTensors
from utils.layers import CPU, HeldLayers, LayerSource, decoder_layers
from utils.models import dtype_argument, load_config, load_model, readable
from utils.sources import Source

log = logging.getLogger("pifa")

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class Tensors(Protocol):
    """Tensors of a file or of several, by the model's own names."""

    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> Tensor: ...


class ReadLayers:
    """Of a model whose layers are on the meta device: filled from `tensors` for as long as they are used.

    dtype: of the filled weights. `now` and `most` count how many layers have their weights, and had at once.
    """

    def __init__(self, model: PreTrainedModel, tensors: Tensors, dtype: torch.dtype):
        self._model, self._tensors, self._dtype = model, tensors, dtype
        self.now = self.most = 0

    @contextlib.contextmanager
    def filled(self, name: str, device: torch.device) -> Iterator[nn.Module]:
        layer = self._model.get_submodule(name)
        empty = dict(layer.named_parameters())
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            for key in empty:
                tensor = self._tensors.read(f"{name}.{key}").to(device, self._dtype)
                put(layer, key, nn.Parameter(tensor, requires_grad=False))
            _move_buffers(layer, device)
            yield layer
        finally:
            for key, parameter in empty.items():
                put(layer, key, parameter)
            _move_buffers(layer, CPU)
            self.now -= 1


class SafetensorsTensors:
    """A transformers folder or hub repository of safetensors, one or several with an index."""

    def __init__(self, source: Source):
        index = _file_of(source, INDEX)
        if index:
            weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
            paths = {file: _file_of(source, file) for file in sorted(set(weight_map.values()))}
        else:
            paths = {SINGLE: _file_of(source, SINGLE)}
        self._path_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in paths.values():
            if path is None:
                raise UsageError(f"{source.location} does not hold all the files that its index names")
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    self._path_of[name] = path
                    self.shapes[name] = tuple(file.get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        with safe_open(self._path_of[name], framework="pt") as file:
            return file.get_tensor(name)


def open_model(source: Source, dtype: torch.dtype) -> tuple[PreTrainedModel, LayerSource]:
    """The model in eval mode, without gradients, its layers without weights, and where to get these.

    Embeddings, norm and head are loaded. Where the source does not hold the model's parameters one to one, as the
    model names and shapes them, the library converts them on loading: the model is then loaded whole, which is logged.

    Raises: UsageError as load_model does.
    """
    config = load_config(source)
    with readable(source):
        with init_empty_weights(include_buffers=False):
            model: Any = transformers.AutoModelForCausalLM.from_config(config, **dtype_argument(dtype))
        model.tie_weights()
        tensors, obstacle = _tensors_of(source, config)
        obstacle = obstacle or (_mismatch(model, tensors, dtype) if tensors else None)
        if tensors is None or obstacle:
            log.info("the model is loaded whole: %s", obstacle)
            model = load_model(source, dtype)
            return model, HeldLayers(model)
        layers = tuple(f"{name}." for name, _ in decoder_layers(model))
        for names in _shared_names(model):
            if not names[0].startswith(layers):
                (stored,) = (name for name in names if name in tensors.shapes)
                parameter = nn.Parameter(tensors.read(stored).to(dtype), requires_grad=False)
                for name in names:
                    put(model, name, parameter)
        if not source.gguf_file and _file_of(source, "generation_config.json"):
            model.generation_config = transformers.GenerationConfig.from_pretrained(source.location)
    return model.eval().requires_grad_(False), ReadLayers(model, tensors, dtype)


def _tensors_of(source: Source, config: transformers.PretrainedConfig) -> tuple[Tensors | None, str | None]:
    """The source's tensors, or why they can't be had one by one."""
    if getattr(config, "quantization_config", None):
        return None, "its weights are quantized"
    if source.gguf_path:
        header = read_header(source.gguf_path)
        if not is_llama(header):
            return None, "layers of a GGUF file are read one by one for llama only"
        return GGUFTensors(source.gguf_path, header, config), None
    if not _file_of(source, INDEX) and not _file_of(source, SINGLE):
        return None, "its safetensors have names of their own"
    return SafetensorsTensors(source), None


def _mismatch(model: PreTrainedModel, tensors: Tensors, dtype: torch.dtype) -> str | None:
    """Why these tensors are not the model's parameters one to one, if they are not."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for names in _shared_names(model):
        stored = [name for name in names if name in tensors.shapes]
        if len(stored) != 1:
            return f"{names[0]} is stored {len(stored)} times under the model's own names"
        if tensors.shapes[stored[0]] != tuple(parameters[names[0]].shape):
            return f"{names[0]} is stored in another shape"
    buffers = model.state_dict().keys() - parameters.keys()
    if buffers:
        return f"{min(buffers)} is stored and no parameter"
    wide = [getattr(model, f"_keep_in_fp32_modules{kind}", None) for kind in ("", "_strict")]
    if dtype != torch.float32 and any(wide):
        return "some of its modules stay in float32"
    return None


def _shared_names(model: nn.Module) -> list[list[str]]:
    """The names of every parameter, several where it is tied."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())


def put(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, parameter)


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    for inner in module.modules():
        for name, buffer in inner.named_buffers(recurse=False):
            inner._buffers[name] = buffer.to(device)


def _file_of(source: Source, name: str) -> Path | None:
    """A file of the folder or hub repository; None where it has none of this name."""
    found = cached_file(source.location, name, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)
