"""The runner's Triton kernels by the functions that launch them. Import it only where there is a GPU.

runner_kernels.py says what each one computes.
"""

from component.runner_attention import decode_attention, rotate_and_store
from component.runner_products import small_products
from component.runner_stream import add_and_norm, silu_product

__all__ = ["add_and_norm", "decode_attention", "rotate_and_store", "silu_product", "small_products"]
