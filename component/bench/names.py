"""Choices of --mode bench: plain values, for the parser."""

PARTS = ("layer", "block", "model", "all")
