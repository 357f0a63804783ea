"""Choices of --mode quantize: plain values, for the parser."""

METHODS = ("gptq", "rtn")
BITS = (4, 8)
