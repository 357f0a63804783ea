"""Choices of --mode export: plain values, for the parser."""

FORMATS = ("transformers", "gguf")
