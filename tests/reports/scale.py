"""What compression costs as models and data grow: python -m tests.reports.scale --calibration text.txt

Runs --mode m and --mode pifa (uniform ranks, exact M, no profile) on models of LLaMA's shapes with random weights, at
several numbers of layers and of windows, and prints time and memory as a table. Every run is a process of its own, so
that peaks are its own. Sizes go from the base (--layers, --windows: the first of each) along one axis at a time.
--processes 1 2 runs all sizes of --mode m by one process and by two, on a card each.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
import transformers

from utils import models, sources
from utils.names import check_dataset
from utils.plots import REQUIREMENTS, Panel, can_plot, draw_panels
from utils.report import markdown_table

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 2},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8},
}
COLUMNS = ("processes", "layers", "windows", "m", "last", "pifa", "device", "host")
HEADER = ["processes", "layers", "windows", "m, s", "of it the last layer, s", "pifa, s", "device, GiB", "host, GiB"]


def make_model(folder: Path, shapes: str, layers: int, tokenizer_of: str, device: torch.device) -> None:
    """A float16 checkpoint with random weights and the tokenizer of another model."""
    tokenizer = models.load_tokenizer(sources.find_source(tokenizer_of))
    config = transformers.LlamaConfig(
        **SHAPES[shapes], num_hidden_layers=layers, vocab_size=max(32000, len(tokenizer)), max_position_embeddings=4096
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, **models.dtype_argument(torch.float16))
    model.to("cpu").save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def command(*flags: str, processes: int = 1) -> dict:
    """The record of one command of the front door."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
    started = [sys.executable, *launcher, "PIFA.py", *flags]
    done = subprocess.run(started, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(options: argparse.Namespace, processes: int, layers: int, windows: int) -> dict:
    folder = Path(options.save_path) / f"{options.shapes}-{layers}"
    if not folder.exists():
        make_model(folder, options.shapes, layers, options.model, torch.device(options.DEV))
    place = ["--save_path", options.save_path, "--prefix", f"{processes}x{layers}x{windows}_", "--DEV", options.DEV]
    flags = ["--mode", "m", "--model", str(folder), "--dataset", options.calibration, "--density", "0.55"]
    flags += ["--allocation", "uniform", "--output_shrinkage", "1", "--token_power", "0", "--heldout_nsamples", "0"]
    flags += ["--pruning_nsamples", str(windows), "--reconstruct_nsamples", str(windows), "--dtype", "float16"]
    flags += ["--model_seq_len", str(options.model_seq_len), *place, *options.more]
    low_rank = command(*flags, processes=processes)
    pivoted = command("--mode", "pifa", "--model_path", low_rank["path"], *place)
    row = {
        "processes": processes,
        "layers": layers,
        "windows": windows,
        "m": low_rank["seconds"],
        "last": low_rank["layer_seconds"][-1],  # the first one waits for libraries to be loaded
        "pifa": pivoted["seconds"],
        "device": max(r["peak_memory_gib"] for r in (low_rank, pivoted)),
        "host": max(r["peak_host_memory_gib"] for r in (low_rank, pivoted)),
    }
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--calibration", required=True, help="text file")
    parser.add_argument("--shapes", default="7b", choices=SHAPES)
    parser.add_argument("--layers", nargs="+", type=int, default=[2])
    parser.add_argument("--windows", nargs="+", type=int, default=[32])
    parser.add_argument("--processes", nargs="+", type=int, default=[1], help="that share the windows of --mode m")
    parser.add_argument("--model_seq_len", type=int, default=2048)
    parser.add_argument("--model", default="smollm2", help="whose tokenizer is taken")
    parser.add_argument("--DEV", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save_path", default="./results/scale", help="models and checkpoints go there")
    parser.add_argument("--json", help="also write all rows there")
    parser.add_argument("--plot", help="also draw seconds over both sizes there (png; needs matplotlib)")
    options, options.more = parser.parse_known_args()
    check_dataset(options.calibration)  # before models are made
    if options.plot and not can_plot():
        parser.error(f"--plot needs matplotlib: pip install -r {REQUIREMENTS}")
    sizes = [(layers, options.windows[0]) for layers in options.layers]
    sizes += [(options.layers[0], windows) for windows in options.windows[1:]]
    rows = [measure(options, processes, *size) for processes in options.processes for size in sizes]
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1))
    print(markdown_table(HEADER, [[row[name] for name in COLUMNS] for row in rows]))
    if options.plot:
        draw_panels(Path(options.plot), panels_of(rows))


def panels_of(rows: list[dict]) -> list[Panel]:
    """Seconds over layers and over windows, each at the base of the other."""
    panels = []
    for size, other in (("layers", "windows"), ("windows", "layers")):
        some = [row for row in rows if row[other] == rows[0][other]]
        lines = {}
        for count in sorted({row["processes"] for row in rows}):
            mine = [row for row in some if row["processes"] == count]
            name = "--mode m" if count == 1 else f"--mode m, {count} processes"
            lines[name] = [(row[size], row["m"]) for row in mine]
            if count == 1:  # pifa is always one process
                lines["--mode pifa"] = [(row[size], row["pifa"]) for row in mine]
        panels.append(Panel(f"{rows[0][other]} {other}", size, "seconds", lines, to_scale=True))
    return panels


if __name__ == "__main__":
    main()
