"""The runner's Triton kernels by the functions that launch them. Import it only where there is a GPU.

runner/ops.py says what each one computes.
"""

from component.runner.gpu.attention import decode_attention, rotate_and_store
from component.runner.gpu.products import small_products
from component.runner.gpu.stream import add_and_norm, silu_product

__all__ = ["add_and_norm", "decode_attention", "rotate_and_store", "silu_product", "small_products"]
