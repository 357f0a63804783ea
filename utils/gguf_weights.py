"""Tensors of a GGUF file under the names, and in the order of rows, that transformers gives them."""

import math
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor

from utils.gguf_file import Header, read_header


class GGUFTensors:
    """Of one file of a LLaMA, dequantized when they are read; the file itself stays on disk (it is memory-mapped).

    llama.cpp rotates neighbouring channels of query and key heads, transformers channels half a head apart: the rows of
    both projections are put back in order.

    Raises: ValueError for a file that ends before its tensors do.
    """

    def __init__(self, path: Path, header: Header, config: transformers.PretrainedConfig):
        import gguf  # which no other source needs

        content = numpy.memmap(path, mode="r").view(numpy.ndarray)  # a plain array's slices are made faster
        self._heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._blocks: dict[str, tuple[Any, Any]] = {}
        for ours, (_, theirs) in known.mapping.items():
            if stored := header.tensors.get(f"{theirs}.weight"):
                kind = gguf.GGMLQuantizationType(stored.kind)
                shape = gguf.quant_shape_to_byte_shape(stored.shape, kind)
                blocks = content[stored.start : stored.start + math.prod(shape)].reshape(shape)
                self.shapes[f"{ours}.weight"], self._blocks[f"{ours}.weight"] = stored.shape, (blocks, kind)

    def read(self, name: str) -> Tensor:
        """float32."""
        import gguf

        weight = torch.from_numpy(gguf.dequantize(*self._blocks[name]).copy())
        heads = self._heads.get(name.split(".")[-2])
        return weight if heads is None else halves_apart(weight, heads)


def load_llama(path: Path, config: transformers.PretrainedConfig, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """The whole model on the CPU. Raises: ValueError where the file does not hold every weight of it."""
    tensors = GGUFTensors(path, read_header(path), config)
    with init_empty_weights(include_buffers=False):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    named = dict(model.named_parameters())
    wrong = [name for name, parameter in named.items() if tensors.shapes.get(name) != tuple(parameter.shape)]
    if wrong:
        raise ValueError(f"it does not hold every weight of its model: {wrong}")
    model.load_state_dict({name: tensors.read(name).to(dtype) for name in named}, strict=False, assign=True)
    model.tie_weights()
    return model


def halves_apart(weight: Tensor, heads: int) -> Tensor:
    """Rows of every head from (pair, 2) to (2, pair) order. weight: (heads * width, d_in)."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
