"""Packs integers as compressed-tensors does. It is an extra: it is imported by the first call that needs it.

Its `pack-quantized` layout was preferred over GPTQ's own (qweight, qzeros, scales): vLLM's tools write it today,
it says its shape and has no off-by-one in its zeros. Only writing needs the library; component/format/packed.py reads.
"""

import importlib.util

import torch
from torch import Tensor

from utils.errors import UsageError

REQUIREMENTS = "requirements-quantize.txt"


def check_installed() -> None:
    """Raises: UsageError with the command that installs compressed-tensors."""
    if importlib.util.find_spec("compressed_tensors") is None:
        raise UsageError(f"--mode quantize needs compressed-tensors: pip install -r {REQUIREMENTS}")


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """(rows, columns) uint8 below 2^bits -> (rows, ceil(columns bits / 32)) int32."""
    return _pack(codes, bits, 1)


def pack_columns(codes: Tensor, bits: int) -> Tensor:
    """(rows, columns) uint8 below 2^bits -> (ceil(rows bits / 32), columns) int32."""
    return _pack(codes, bits, 0)


def _pack(codes: Tensor, bits: int, dimension: int) -> Tensor:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    signed = codes.to(torch.int16) - 2 ** (bits - 1)  # the library adds this again
    return pack_to_int32(signed.to(torch.int8), bits, dimension)
