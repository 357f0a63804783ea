"""Tensors of a GGUF file under the names, and in the order of rows, that transformers gives them."""

from pathlib import Path
from typing import Any, Self

import torch
import transformers
from torch import Tensor

FAMILY = "llama"  # in both libraries; others need conversions of their own


class GGUFTensors:
    """Of one file, dequantized when they are read; the file itself stays on disk (it is memory-mapped).

    llama.cpp rotates neighbouring channels of query and key heads, transformers channels half a head apart: the rows of
    both projections are put back in order.
    """

    def __init__(self, reader: Any, config: transformers.PretrainedConfig):
        import gguf  # which no other source needs

        stored: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}
        self._heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
        self._tensors: dict[str, Any] = {}
        for ours, (_, theirs) in known.mapping.items():
            if f"{theirs}.weight" in stored:
                self._tensors[f"{ours}.weight"] = stored[f"{theirs}.weight"]
        # GGUF counts dimensions from the innermost one
        self.shapes = {name: tuple(map(int, reversed(tensor.shape))) for name, tensor in self._tensors.items()}

    @classmethod
    def of(cls, path: Path, config: transformers.PretrainedConfig) -> tuple[Self | None, str | None]:
        """The tensors, or why they can't be had one by one."""
        import gguf

        reader = gguf.GGUFReader(path)
        field = reader.fields["general.architecture"]
        architecture = bytes(field.parts[field.data[0]]).decode()
        if architecture != FAMILY or config.model_type != FAMILY:
            return None, f"layers of a GGUF file are read one by one for {FAMILY} only"
        return cls(reader, config), None

    def read(self, name: str) -> Tensor:
        """float32."""
        import gguf

        tensor = self._tensors[name]
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        heads = self._heads.get(name.split(".")[-2])
        return weight if heads is None else halves_apart(weight, heads)


def halves_apart(weight: Tensor, heads: int) -> Tensor:
    """Rows of every head from (pair, 2) to (2, pair) order. weight: (heads * width, d_in)."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
