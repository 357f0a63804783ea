"""Names that flags take where checkpoints are chosen and written: plain values, for the parser."""

FORMATS = ("transformers", "gguf")
ORIGINAL = "original"  # --model_path of the model that is not compressed
