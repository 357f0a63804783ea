"""Choices of --mode bench: plain values, for the parser."""

PARTS = ("layer", "block", "model")  # in the order in which they are measured
ALL = "all"
