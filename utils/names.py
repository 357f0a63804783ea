"""Names that flags take: plain values, for the parser."""

DTYPES = ("float32", "float16", "bfloat16")
