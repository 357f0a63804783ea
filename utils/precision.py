"""How exactly float32 products are computed, for a while."""

import contextlib
from collections.abc import Iterator

import torch


def full_precision() -> contextlib.AbstractContextManager[None]:
    """No TF32 inside: rounding of the inputs to 10 bits would be the largest error of all."""
    return matmul_precision("highest")


@contextlib.contextmanager
def matmul_precision(level: str) -> Iterator[None]:
    """Float32 products inside at this of torch's levels; as they were after it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(level)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
