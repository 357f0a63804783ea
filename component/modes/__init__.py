"""A file per `--mode`: the flags that it reads, their checks, and its run.

Each has SUMMARY (a line of `--help`), FLAGS, `check(options)` and `run(options)`. The parser imports all of them, so
they import nothing heavy before they run.
"""

MODES = ("m", "bi", "pifa", "ppl", "eval", "generate", "finetune", "quantize", "info", "export", "bench")
