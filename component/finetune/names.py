"""Choices of --mode finetune: plain values, for the parser."""

ORDERS = ("sequential", "joint", "full")
COMPUTE_DTYPES = ("float32", "bfloat16")  # float16 would need its loss scaled, and overflows even so
SELF = "self"  # the entry of a mixture that the teacher writes (self_text.py)
