"""docs/results.md's tables: python -m tests.reports.quality --calibration valid.txt --test test.txt --part NAME

Parts: densities (the default at six densities, through the front door's own commands), allocations (every allocation
with the same solver), ablation (the default less one of its ingredients at a time, and plus what is off by default),
refined (the separate tier of --refine_steps), forms (factors, fewer channels, and the better of them by block). All
but the first compress in memory and write nothing but the profile.
Every row is judged on the test text and on one of another domain, Python's language reference, windows of the same
length from both; no choice looks at either.
"""

import argparse
import json
import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import PIFA
from component import plan_compression
from component.checkpoint.counting import stored_as
from component.compress.judging import window_losses
from component.flow.batches import windows_at_once
from component.flow.means import Means
from component.ranks.allocation import ALLOCATIONS
from utils import data, models
from utils.layers import HeldLayers, decoder_layers
from utils.report import markdown_table
from utils.sources import find_source

DENSITIES = ("0.9", "0.8", "0.7", "0.6", "0.5", "0.4")
FEW = ("0.8", "0.5", "0.4")
ABLATION: dict[str, dict[str, Any]] = {
    "default": {},
    "no drift repair": {"drift_factor": 0.0},
    "drift repaired by half as much": {"drift_factor": 0.25},
    "errors of all outputs alike": {"output_shrinkage": 1.0},
    "all tokens alike": {"token_power": 0.0},
    "no dense flow in the target (lambda 0)": {"old_output_factor": 0.0},
    "ten times the ridge": {"ridge": 0.01},
    "ranks in multiples of 32": {"rank_multiple": 32},
    "a second pass": {"passes": 2},
}

FORMS: dict[str, dict[str, Any]] = {
    "W": {"prune": "svd-llm", "reconstruct_step": 0, "use_pifa": False},
    "MPIFA, uniform": {"reconstruct_step": 2},
    "default": {},
    "flatllm": {"prune": "flatllm"},
    "auto": {"prune": "auto"},
}


class Bench:
    """One model, one calibration text, two texts to judge on; rows differ in flags."""

    def __init__(self, options: argparse.Namespace):
        counts = {name: int(options.nsamples) for name in ("pruning_nsamples", "reconstruct_nsamples")}
        length = int(options.model_seq_len)
        self.common = {"dataset": options.calibration, "model_seq_len": length, **counts}
        self.front_door = ["--mode", "m", *flags_for(self.common), "--save_path", options.save_path]
        self.front_door += ["--model", options.model, "--resume"]
        source = find_source(options.model)
        self.tokenizer = models.load_tokenizer(source)
        self.model = models.load_model(source, torch.float32)
        texts = [data.read_text(name, "test").text for name in (options.test, "pydoc")]
        tokens = [data.tokenize(self.tokenizer, text) for text in texts]
        self.windows = [data.consecutive_windows(t, length, options.eval_nsamples) for t in tokens]

    def row(self, flags: dict[str, Any]) -> dict:
        """Compress in memory with these flags and judge."""
        began = time.perf_counter()
        with plan_compression(self.model, self.tokenizer, **self.common, **flags) as pipeline:
            profiled = time.perf_counter()
            recipe, tuned = pipeline.choose()
            chosen = time.perf_counter()
            design, settings = pipeline.design(recipe), pipeline.task.settings
            losses = self.losses(pipeline.layers(design), pipeline.task.means)
            numbers = sum(stored_as(entry, settings.storage) for entry in design.entries.values())
            return {
                "flags": flags,
                "density": numbers / sum(module.numbers for module in pipeline.task.modules),
                "ppl": losses[0],
                "pydoc": losses[1],
                "profile_seconds": profiled - began,
                "seconds": time.perf_counter() - chosen,
                "tuned": tuned,
            }

    def losses(self, layers: Iterable[tuple[int, nn.Module]], means: Means) -> list[float]:
        """Perplexity on either text with these layers."""
        both = torch.cat(self.windows)
        losses = window_losses(self.model, layers, both, device=means.device, batch=means.batch)
        return [part.mean().exp().item() for part in losses.split([len(windows) for windows in self.windows])]

    def dense(self) -> dict:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        named = decoder_layers(self.model)
        means = Means(device, HeldLayers(self.model), batch=windows_at_once(self.common["model_seq_len"]))
        losses = self.losses(((index, layer.to(device)) for index, (_, layer) in enumerate(named)), means)
        self.model.to("cpu")
        return {"flags": ["dense"], "density": 1.0, "ppl": losses[0], "pydoc": losses[1]}


def flags_for(keywords: dict[str, Any]) -> list[str]:
    """The command line that these keyword arguments stand for."""
    return [word for name, value in keywords.items() for word in (f"--{name}", str(value))]


def flags_of(allocation: str, density: str) -> dict[str, Any]:
    """MPIFA_NS keeps 0.1 less of attention than of the whole, as the paper's best rows do."""
    kept = float(density)
    if allocation == "MPIFA_NS":
        return {"density": kept, "owl": True, "attn_ratio": round(1 - kept + 0.1, 2)}
    return {"density": kept, "allocation": allocation}


def through_the_front_door(options: argparse.Namespace, bench: Bench) -> list[dict]:
    """--mode m, pifa and ppl at every density; the perplexities are those of the pivoted folder."""
    rows = []
    for density in options.densities or DENSITIES:
        low_rank = PIFA.run([*bench.front_door, "--density", density])
        place = ["--model_path", low_rank["path"], "--save_path", options.save_path, "--resume"]
        pivoted = PIFA.run(["--mode", "pifa", *place])
        judged = [
            "--mode",
            "ppl",
            "--model",
            options.model,
            "--model_path",
            pivoted["path"],
            "--dataset",
            options.test,
            "pydoc",
        ]
        judged += ["--model_seq_len", options.model_seq_len]
        judged += ["--eval_nsamples", str(options.eval_nsamples)] if options.eval_nsamples else []
        ppls = list(PIFA.run(judged)["ppls"].values())
        times = {"profile_seconds": low_rank["profile_seconds"], "seconds": low_rank["seconds"]}
        rows.append(
            {"name": f"default {density}", "density": pivoted["density"], "ppl": ppls[0], "pydoc": ppls[1], **times}
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--calibration", required=True, help="text file, such as WikiText-2 validation")
    parser.add_argument("--test", required=True, help="text file, such as WikiText-2 test")
    parser.add_argument("--part", required=True, choices=["densities", "allocations", "ablation", "refined", "forms"])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--densities", nargs="+")
    parser.add_argument("--rows", nargs="+", help="only these rows of the part")
    parser.add_argument("--nsamples", default="64")
    parser.add_argument("--model_seq_len", default="2048")
    parser.add_argument("--eval_nsamples", type=int, help="of each text the first N windows only")
    parser.add_argument("--refine_steps", default="64")
    parser.add_argument("--save_path", default="./results")
    parser.add_argument("--json", help="also write all rows there")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    bench = Bench(options)
    densities = options.densities or FEW
    named: list[tuple[str, str, dict[str, Any]]] = []
    for density in densities:
        if options.part == "allocations":
            names = [*ALLOCATIONS, "MPIFA_NS"]
            named += [(name, density, flags_of(name, density)) for name in names]
        elif options.part == "ablation":
            named += [(name, density, {"density": float(density), **flags}) for name, flags in ABLATION.items()]
        elif options.part == "forms":
            named += [(name, density, {"density": float(density), **flags}) for name, flags in FORMS.items()]
        else:
            named += [("refined", density, {"density": float(density), "refine_steps": int(options.refine_steps)})]
    if options.part == "densities":
        rows = [{"name": "dense", **bench.dense()}, *through_the_front_door(options, bench)]
    else:
        rows = []
        for name, density, flags in named:
            if options.rows and name not in options.rows:
                continue
            rows.append({"name": name, "asked": density, **bench.row(flags)})
            print(json.dumps(rows[-1]), flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1))
    print(table(rows))


def table(rows: list[dict]) -> str:
    keys = ("name", "asked", "density", "ppl", "pydoc", "profile_seconds", "seconds")
    header = ["method", "density asked", "realised", "WikiText-2", "pydoc", "profile, s", "all else, s"]
    cells = [[f"{v:.4g}" if isinstance(v := row.get(key, ""), float) else v for key in keys] for row in rows]
    return markdown_table(header, cells)


if __name__ == "__main__":
    main()
