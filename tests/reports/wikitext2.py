"""docs/results.md's table on WikiText-2: python -m tests.reports.wikitext2 --calibration valid.txt --test test.txt

Runs the front door's own commands, one after the other in one process, and prints a Markdown table. Results are
kept under --save_path; run it again with the same flags and finished checkpoints are used as they are.
"""

import argparse
import json
import logging
from pathlib import Path

import PIFA
from utils.report import markdown_table

SVD_LLM = ["--no-use_pifa", "--allocation", "uniform"]
METHODS = {
    "SVD": ["--prune", "svd", *SVD_LLM],
    "ASVD": ["--prune", "asvd", *SVD_LLM],
    "W": ["--reconstruct_step", "0", *SVD_LLM],
    "W, 128 windows, seed 103": ["--reconstruct_step", "0", *SVD_LLM, "--pruning_nsamples", "128", "--seed", "103"],
    "W + U": ["--reconstruct_step", "1", "--old_output_factor", "0", "--reconstruct_nsamples", "16", *SVD_LLM],
    "FLAT-LLM": ["--prune_method", "flatllm"],
    "FLAT-LLM, two flows": ["--prune", "flatllm"],
    "MPIFA, the paper's": ["--reconstruct_step", "2", "--allocation", "uniform"],
    # nothing but the solver differs from the row above
    "MPIFA, exact M": ["--drift_factor=0", "--output_shrinkage=1", "--token_power=0", "--allocation", "uniform"],
    "default": ["--heldout_nsamples", "16"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--calibration", required=True, help="text file, such as WikiText-2 validation")
    parser.add_argument("--test", required=True, help="text file, such as WikiText-2 test")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--densities", nargs="+", default=["0.8", "0.6", "0.5", "0.4"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--float16", action="store_true", help="judge pivoted methods in that too")
    parser.add_argument("--nsamples", default="64")
    parser.add_argument("--model_seq_len", default="2048")
    parser.add_argument("--save_path", default="./results")
    parser.add_argument("--json", help="also write all records there")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)

    length = ["--model_seq_len", options.model_seq_len, "--model", options.model]
    common = ["--dataset", options.calibration, "--save_path", options.save_path, "--resume", *length]
    common += ["--pruning_nsamples", options.nsamples, "--reconstruct_nsamples", options.nsamples]
    common += ["--heldout_nsamples", "0"]  # nothing is chosen, and the published windows come from the whole text

    def ppl(path: str, *flags: str) -> float:
        return PIFA.run(["--mode", "ppl", "--model_path", path, "--dataset", options.test, *length, *flags])["ppl"]

    records = [{"method": "dense", "density": "1", "ppl": ppl("original")}]
    for method in options.methods:
        for density in options.densities:
            low_rank = PIFA.run(["--mode", "m", *common, "--density", density, *METHODS[method]])
            row = {"method": method, "density": density, "m": low_rank, "ppl": ppl(low_rank["path"])}
            if low_rank["kind"] == "lowrank" and low_rank["use_pifa"]:
                place = ["--model_path", low_rank["path"], "--resume", "--save_path"]
                row["pifa"] = PIFA.run(["--mode", "pifa", *place, options.save_path])
                row["ppl_pifa"] = ppl(row["pifa"]["path"])
                if options.float16:
                    half = ["--dtype", "float16"]
                    halved = PIFA.run(["--mode", "pifa", *place, f"{options.save_path}/half", *half])
                    row["ppl_half"], row["ppl_half_pifa"] = ppl(low_rank["path"], *half), ppl(halved["path"], *half)
            print(json.dumps({key: value for key, value in row.items() if key not in ("m", "pifa")}), flush=True)
            records.append(row)
            if options.json:
                Path(options.json).write_text(json.dumps(records, indent=1))

    header = ["method", "density asked", "realised", "ppl", "pivoted", "float16", "float16 pivoted", "m, s", "pifa, s"]
    rows = []
    for row in records:
        stored = row.get("pifa") or row.get("m") or {"density": 1.0}
        seconds = [row[mode]["seconds"] if mode in row else "" for mode in ("m", "pifa")]
        ppls = [row.get(key, "") for key in ("ppl", "ppl_pifa", "ppl_half", "ppl_half_pifa")]
        rows.append([row["method"], row["density"], stored["density"], *ppls, *seconds])
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
