"""The table of the small model (docs/results.md): python -m tests.reports.demo (what `make demo` runs)

Compresses SmolLM2-135M to half its decoder weights on the CPU in several ways, judges each on the part of Python's
language reference that no calibration saw, and prints a Markdown table and a sentence from the dense and the pivoted
model. Checkpoints stay under --save_path; a second run uses them as they are and only judges again.
"""

import argparse
import logging
import os
import sys
import tempfile
from pathlib import Path

import torch

import PIFA
from component.checkpoint import reading as files
from utils import models, sources
from utils.errors import RunError, UsageError
from utils.report import markdown_table

PUBLISHED = ["--allocation", "uniform"]
METHODS = {
    "plain SVD": ["--prune", "svd", "--no-use_pifa", *PUBLISHED],
    "SVD-LLM": ["--reconstruct_step", "0", "--no-use_pifa", *PUBLISHED],
    "MPIFA, the paper's": ["--reconstruct_step", "2", *PUBLISHED],
    "default, low-rank": [],
}
PIVOTED = {"MPIFA, the paper's": "MPIFA, the paper's", "default, low-rank": "default, pivoted"}  # row -> pivoted row
LAST = "default, pivoted"
QUICK = ("SVD-LLM", "default, low-rank")  # what there is time for in a demo
PROMPT = "An import statement in Python"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--density", default="0.5")
    parser.add_argument("--all", action="store_true", help="plain SVD and the paper's MPIFA too")
    parser.add_argument("--eval_nsamples", default="8", help="windows of 512 tokens")
    parser.add_argument("--save_path", default="./results/demo")
    options = parser.parse_args()
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        methods = METHODS if options.all else {name: METHODS[name] for name in QUICK}
        show(methods, options.density, options.eval_nsamples, options.save_path)
    except (UsageError, RunError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def show(methods: dict[str, list[str]], density: str, windows: str, save_path: str) -> None:
    model = ["--model", str(unpacked("smollm2", Path(save_path))), "--DEV", "cpu"]
    place = ["--save_path", save_path, "--resume", "--DEV", "cpu"]
    records = {}
    for method, flags in methods.items():
        print(f"{method} at density {density}", file=sys.stderr)
        records[method] = PIFA.run(["--mode", "m", *model, "--dataset", "pydoc", "--density", density, *flags, *place])
    for method, row in PIVOTED.items():
        if method not in methods:
            continue
        print(f"{row}, pivoting", file=sys.stderr)
        records[row] = PIFA.run(["--mode", "pifa", "--model_path", records[method]["path"], *place])

    paths = {"dense": "original"} | {method: record["path"] for method, record in records.items()}
    mib = {"dense": dense_mib(records[LAST])} | {method: record["linear_mib"] for method, record in records.items()}
    rows = []
    for method, path in paths.items():
        judged = ["--mode", "ppl", *model, "--model_path", path, "--dataset", "pydoc", "--eval_nsamples", windows]
        result = PIFA.run(judged)
        speed = round(result["tokens_per_second"])
        rows.append([method, f"{result['density']:.3f}", f"{mib[method]:.1f}", f"{result['ppl']:.5g}", speed])
    print(markdown_table(["method", "density", "MiB of decoder weights", "perplexity", "tokens/s"], rows))
    for method in ("dense", LAST):
        print(f"\n{method}:")
        PIFA.run(["--mode", "generate", *model, "--model_path", paths[method], "--prompt", PROMPT, "--no-chat"])


def unpacked(name: str, save_path: Path) -> Path:
    """The model as a float32 safetensors folder: every step loads it, and unpacking a GGUF file is slow."""
    folder = save_path / name
    if not folder.exists():
        source = sources.find_source(name)
        save_path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=save_path) as temporary:
            whole = Path(temporary) / name
            models.load_model(source, torch.float32).save_pretrained(whole)
            models.load_tokenizer(source).save_pretrained(whole)
            whole.rename(folder)
    return folder


def dense_mib(record: dict) -> float:
    """MiB of the same linears before compression, in the dtype of the compressed ones."""
    layers = files.read_checkpoint(record["path"]).layers.values()
    numbers = sum(layer["in_features"] * layer["out_features"] for layer in layers)
    return numbers * models.DTYPES[record["dtype"]].itemsize / 2**20


if __name__ == "__main__":
    sys.exit(main())
