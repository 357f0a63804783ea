"""A linear layer whose weight is stored as packed integers of 4 or 8 bits.

The tensors are those of compressed-tensors' `pack-quantized` format, so that its readers and kernels can take them:
`weight_packed`, codes of a row one after the other, the first in the lowest bits of an int32; `weight_scale`;
`weight_zero_point`, packed in the same way down the columns; `weight_shape`. Where a row of codes or a column of zeros
does not fill its last int32, the rest is zero bits or anything else: nobody reads it.

This file travels inside every checkpoint (see integration.py), so it imports nothing but torch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BITS = (4, 8)


class PackedLinear(nn.Module):
    """y = W x + b with W = scale (code - zero), scales and zeros by groups of `group_size` input columns.

    weight_packed: (d_out, ceil(d_in bits / 32)) int32, weight_scale: (d_out, groups) float16, weight_zero_point:
    (ceil(d_out bits / 32), groups) int32, weight_shape: (2,) int64; groups = ceil(d_in / group_size), the last one
    shorter where group_size does not divide d_in. The forward pass unpacks to the dtype of its input, then multiplies.

    The constructor allocates only (it works on the meta device); `from_packed` fills. dtype: of the bias and of
    `weight`. Converting the module to another dtype converts its scales: to bfloat16 that loses bits.

    Raises: ValueError for other bits, or a group_size below 1.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    weight_shape: Tensor

    def __init__(self, in_features, out_features, bits, group_size, bias=False, device=None, dtype=None):
        super().__init__()
        if bits not in BITS or group_size < 1:
            raise ValueError(f"{bits} bits in groups of {group_size}: bits are 4 or 8, groups have 1 column or more")
        self.in_features, self.out_features, self.bits, self.group_size = in_features, out_features, bits, group_size
        self.dtype = dtype or torch.get_default_dtype()
        groups = -(-in_features // group_size)
        packed = torch.empty(out_features, _words(in_features, bits), dtype=torch.int32, device=device)
        zeros = torch.empty(_words(out_features, bits), groups, dtype=torch.int32, device=device)
        self.register_buffer("weight_packed", packed)
        self.register_buffer("weight_scale", torch.empty(out_features, groups, dtype=torch.float16, device=device))
        self.register_buffer("weight_zero_point", zeros)
        self.register_buffer("weight_shape", torch.tensor([out_features, in_features], device=device))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    @torch.no_grad()
    def from_packed(
        cls,
        packed: Tensor,
        scales: Tensor,
        zeros: Tensor,
        shape: tuple[int, int],
        bits: int,
        group_size: int,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> "PackedLinear":
        """shape: (d_out, d_in); the tensors as the class describes them, on the device of `packed`."""
        layer = cls(shape[1], shape[0], bits, group_size, bias is not None, packed.device, dtype)
        layer.weight_packed.copy_(packed)
        layer.weight_scale.copy_(scales)
        layer.weight_zero_point.copy_(zeros)
        if layer.bias is not None and bias is not None:
            layer.bias.copy_(bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantized(x.dtype), self.bias)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """W: (d_out, d_in), exact in float32 and rounded to `dtype` from there."""
        codes = unpack(self.weight_packed, self.bits, self.in_features)
        zeros = unpack(self.weight_zero_point.t(), self.bits, self.out_features).t()
        groups = self.weight_scale.shape[1]
        codes = F.pad(codes, (0, groups * self.group_size - self.in_features))
        grouped = codes.unflatten(1, (groups, self.group_size)).float() - zeros[..., None].float()
        weight = grouped.mul_(self.weight_scale[..., None].float())
        return weight.flatten(1)[:, : self.in_features].to(dtype)

    @property
    def weight(self) -> Tensor:
        """W, made anew at every call, in the layer's dtype."""
        return self.dequantized(self.dtype)

    def dense_weight(self) -> Tensor:
        return self.weight

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, bias={self.bias is not None}"
        )


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """(rows, words) int32 -> the first `count` codes of each row, (rows, count) uint8."""
    rows, words = packed.shape
    codes = packed.reshape(-1).view(torch.uint8).view(rows, 4 * words)  # the lowest byte comes first
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1)
    return codes[:, :count]


def _words(count: int, bits: int) -> int:
    return -(-count * bits // 32)
