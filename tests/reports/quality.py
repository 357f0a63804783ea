"""The README's tables of methods: python -m tests.reports.quality --calibration valid.txt --test test.txt --part NAME

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
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import PIFA
from component.checkpoint.counting import stored_as
from component.compress.auto_planner import planner_of
from component.compress.factor_planner import recipe_of, storage_of
from component.compress.job import Job, prepare
from component.compress.judging import held_out_perplexity, window_losses
from component.compress.pipeline import BATCH_TOKENS
from component.compress.recipe import Recipe, choose
from component.flow.means import Flows, Means
from component.flow.modules import modules_of
from component.flow.streaming import Compression, Refinement, compress_layers
from component.ranks.allocation import ALLOCATIONS
from utils import data, models
from utils.attention import repeat_heads
from utils.layers import HeldLayers, describe_layers
from utils.report import markdown_table

DENSITIES = ("0.9", "0.8", "0.7", "0.6", "0.5", "0.4")
FEW = ("0.8", "0.5", "0.4")
ABLATION = {
    "default": [],
    "no drift repair": ["--drift_factor", "0"],
    "drift repaired by half as much": ["--drift_factor", "0.25"],
    "errors of all outputs alike": ["--output_shrinkage", "1"],
    "all tokens alike": ["--token_power", "0"],
    "no dense flow in the target (lambda 0)": ["--old_output_factor", "0"],
    "ten times the ridge": ["--ridge", "0.01"],
    "ranks in multiples of 32": ["--rank_multiple", "32"],
    "a second pass": ["--passes", "2"],
}

FORMS = {
    "W": ["--prune", "svd-llm", "--reconstruct_step", "0", "--no-use_pifa"],
    "MPIFA, uniform": ["--reconstruct_step", "2"],
    "default": [],
    "flatllm": ["--prune", "flatllm"],
    "auto": ["--prune", "auto"],
}


class Bench:
    """One model, one calibration text, two texts to judge on; rows differ in flags."""

    def __init__(self, options: argparse.Namespace):
        self.common = ["--mode", "m", "--dataset", options.calibration, "--save_path", options.save_path]
        self.common += ["--model", options.model, "--model_seq_len", options.model_seq_len, "--resume"]
        self.common += ["--pruning_nsamples", options.nsamples, "--reconstruct_nsamples", options.nsamples]
        first = self.options([])
        self.job = prepare(first)
        self.device = torch.device(first.DEV)
        self.model = models.load_model(self.job.source, torch.float32)
        if self.device.type == "cuda":
            repeat_heads(self.model)
        self.described = describe_layers(self.model)
        self.modules = modules_of(self.model, self.described)
        self.batch = max(1, BATCH_TOKENS // first.model_seq_len)
        self.means = Means(self.device, HeldLayers(self.model), batch=self.batch)
        texts = [data.read_text(name, "test").text for name in (options.test, "pydoc")]
        tokens = [data.tokenize(self.job.tokenizer, text) for text in texts]
        whole = [
            t[: len(t) // first.model_seq_len * first.model_seq_len].reshape(-1, first.model_seq_len) for t in tokens
        ]
        self.windows = [w[: options.eval_nsamples] for w in whole]

    def options(self, flags: list[str]) -> argparse.Namespace:
        return PIFA.parse([*self.common, *flags])

    def row(self, flags: list[str]) -> dict:
        """Compress in memory with these flags and judge."""
        job = replace(self.job, options=self.options(flags))
        start = recipe_of(job.options)
        # one profile serves all rows: with and without output weighting
        recipes = [replace(start, output_shrinkage=shrinkage) for shrinkage in (0.1, None)]
        began = time.perf_counter()
        planner = planner_of(job, self.model, self.described, self.modules, start, recipes, self.means)
        profiled = time.perf_counter()
        recipe, tuned = choose(start, planner.kinds(start), [], 0, lambda one: self.held_out(job, planner, one))
        chosen = time.perf_counter()
        both = torch.cat(self.windows)
        losses = window_losses(
            self.model, self.layers(job, planner, recipe), both, device=self.device, batch=self.batch
        )
        parts = losses.split([len(windows) for windows in self.windows])
        storage, entries = storage_of(job.options), planner.entries(planner.plan(recipe))
        numbers = sum(stored_as(entry, storage) for entry in entries.values())
        return {
            "flags": flags,
            "density": numbers / sum(m.numbers for m in self.modules),
            "ppl": parts[0].mean().exp().item(),
            "pydoc": parts[1].mean().exp().item(),
            "profile_seconds": profiled - began,
            "seconds": time.perf_counter() - chosen,
            "tuned": tuned,
        }

    def layers(self, job: Job, planner: Any, recipe: Recipe) -> Iterator:
        options = job.options
        flows = Flows(job.windows, whitening=options.pruning_nsamples, reconstruction=options.reconstruct_nsamples)
        steps = options.refine_steps
        compression = Compression(
            planner.plan(recipe),
            planner.solver(recipe),
            dtype=torch.float32,
            layer_solver=planner.narrowing(recipe),
            refinement=Refinement(steps=steps, drift_ratio=recipe.drift_factor, seed=options.seed) if steps else None,
        )
        return compress_layers(self.model, self.described, compression, flows=flows, means=self.means)

    def held_out(self, job: Job, planner: Any, recipe: Recipe) -> float:
        layers = self.layers(job, planner, recipe)
        return held_out_perplexity(self.model, layers, job.held_out, device=self.device, batch=self.batch)

    def dense(self) -> dict:
        layers = ((i, self.model.get_submodule(d.name).to(self.device)) for i, d in enumerate(self.described))
        losses = window_losses(self.model, layers, torch.cat(self.windows), device=self.device, batch=self.batch)
        parts = losses.split([len(windows) for windows in self.windows])
        self.model.to("cpu")
        return {
            "flags": ["dense"],
            "density": 1.0,
            **{k: p.mean().exp().item() for k, p in zip(("ppl", "pydoc"), parts, strict=True)},
        }


def flags_of(allocation: str, density: str) -> list[str]:
    """MPIFA_NS keeps 0.1 less of attention than of the whole, as the paper's best rows do."""
    flags = ["--density", density]
    if allocation == "MPIFA_NS":
        return [*flags, "--owl", "--attn_ratio", f"{1 - float(density) + 0.1:.2f}"]
    return [*flags, "--allocation", allocation]


def through_the_front_door(options: argparse.Namespace, bench: Bench) -> list[dict]:
    """--mode m, pifa and ppl at every density; the perplexities are those of the pivoted folder."""
    rows = []
    for density in options.densities or DENSITIES:
        low_rank = PIFA.run([*bench.common, "--density", density])
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
    named: list[tuple[str, str, list[str]]] = []
    for density in densities:
        if options.part == "allocations":
            names = [*ALLOCATIONS, "MPIFA_NS"]
            named += [(name, density, flags_of(name, density)) for name in names]
        elif options.part == "ablation":
            named += [(name, density, ["--density", density, *flags]) for name, flags in ABLATION.items()]
        elif options.part == "forms":
            named += [(name, density, ["--density", density, *flags]) for name, flags in FORMS.items()]
        else:
            named += [("refined", density, ["--density", density, "--refine_steps", options.refine_steps])]
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
