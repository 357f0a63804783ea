"""Judges a model: perplexity, zero-shot tasks. Knows nothing of how the model was made."""

import importlib.metadata
import importlib.util
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from component.checkpoint import reading as files
from utils import data, models, report
from utils.attention import repeat_heads
from utils.errors import RunError, UsageError

EVAL_REQUIREMENTS = "requirements-eval.txt"


class Perplexity(NamedTuple):
    """exp of the mean negative log-likelihood per predicted token, and what it was measured on."""

    ppl: float
    tokens: int
    windows: int
    tokens_per_second: float


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor, batch_size: int) -> Perplexity:
    """Perplexity as the papers compute it: whole windows, each on its own, float32 logits, mean over all tokens.

    windows: (count, length) int64; each predicts its length - 1 last tokens. `tokens` counts those of the windows.

    Raises: RunError naming the first window whose loss is not finite.
    """
    device = next(model.parameters()).device
    losses: list[Tensor] = []
    began = time.perf_counter()
    for batch in tqdm(windows.split(batch_size), desc="perplexity", unit="batch"):
        logits = model(batch.to(device), use_cache=False).logits
        # a window at a time: float32 logits of a whole batch would be the largest tensor of the run
        for window, scores in zip(batch.to(device), logits, strict=True):
            losses.append(F.cross_entropy(scores[:-1].float(), window[1:]))
    values = torch.stack(losses).double().cpu()
    seconds = time.perf_counter() - began
    wrong = (~torch.isfinite(values)).nonzero().flatten()
    if len(wrong):
        raise RunError(f"the loss of window {wrong[0].item()} (of {len(values)}) is not finite")
    return Perplexity(values.mean().exp().item(), windows.numel(), len(windows), windows.numel() / seconds)


def run_ppl(options: Namespace) -> dict[str, Any]:
    """--mode ppl: perplexity on each --dataset; returns the result record."""
    texts = [data.read_text(name, "test") for name in options.dataset or [None]]
    source = find_model(options)
    tokenizer = models.load_tokenizer(source)
    windows = {
        text.name: data.consecutive_windows(
            data.tokenize(tokenizer, text.text), options.model_seq_len, options.eval_nsamples
        )
        for text in texts
    }
    model, watch, record = load_judged(options, source)
    if record["dtype"] == "float32" and watch.device.type == "cuda":
        repeat_heads(model)
    results = {name: perplexity(model, rows, options.eval_batch_size) for name, rows in windows.items()}
    first = results[texts[0].name]
    return {
        **record,
        "mode": "ppl",
        "dataset": texts[0].name,
        "ppl": first.ppl,
        "tokens": first.tokens,
        "windows": first.windows,
        "model_seq_len": options.model_seq_len,
        "tokens_per_second": round(first.tokens_per_second, 1),
        **({"ppls": {name: result.ppl for name, result in results.items()}} if len(results) > 1 else {}),
        **watch.readings(),
    }


def run_eval(options: Namespace) -> dict[str, Any]:
    """--mode eval: tasks of the lm-evaluation-harness; prints its measures and returns the result record.

    Raises: UsageError without the harness, or for a task that it does not know.
    """
    names, manager = _tasks(options)
    source = find_model(options)
    tokenizer = models.load_tokenizer(source)
    model, watch, record = load_judged(options, source)
    results = zero_shot(model, tokenizer, names, manager, options)
    rows = [[name, measure, value] for name, found in results.items() for measure, value in found.items()]
    print(report.markdown_table(["task", "measure", "value"], rows))
    return {
        **record,
        "mode": "eval",
        "dataset": ", ".join(results),
        "tasks": results,
        "num_fewshot": options.num_fewshot,
        "task_limit": options.task_limit,
        "lm_eval": importlib.metadata.version("lm_eval"),
        **watch.readings(),
    }


def _tasks(options: Namespace) -> tuple[list[str], Any]:
    """The tasks' names and the harness's manager, which also knows those of --task_path."""
    if not options.tasks:
        raise UsageError(
            "--mode eval needs --tasks, such as --tasks arc_easy piqa; --task_path names a folder of own ones"
        )
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError(f"--mode eval needs the lm-evaluation-harness: pip install -r {EVAL_REQUIREMENTS}")
    if options.task_path is not None and not Path(options.task_path).is_dir():
        raise UsageError(f"no such folder of tasks: {options.task_path}")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=options.task_path)
    unknown = [name for name in options.tasks if not manager.match_tasks([name])]
    if unknown:
        raise UsageError(
            f"unknown task {unknown[0]}: `lm_eval ls tasks` lists them, --task_path adds a folder of own ones"
        )
    return options.tasks, manager


def zero_shot(
    model: Any, tokenizer: Any, names: list[str], manager: Any, options: Namespace
) -> dict[str, dict[str, float]]:
    """Task -> measure -> value, by the lm-evaluation-harness on the model as it is in memory."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    judged = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.eval_batch_size)
    found: Any = lm_eval.simple_evaluate(
        model=judged,
        tasks=names,
        task_manager=manager,
        num_fewshot=options.num_fewshot,
        limit=options.task_limit,
        random_seed=options.seed,
        numpy_random_seed=options.seed,
        torch_random_seed=options.seed,
        fewshot_random_seed=options.seed,
        bootstrap_iters=100,  # some measures have no standard error but by resampling
        log_samples=False,
    )
    return {
        task: {name.removesuffix(",none"): value for name, value in measures.items() if isinstance(value, float)}
        for task, measures in found["results"].items()
    }


def find_model(options: Namespace) -> models.Source:
    """What --model_path names: `original` is --model, None the newest finished checkpoint under --save_path.

    Raises: UsageError where there is none, or a shard is damaged.
    """
    if options.model_path == "original":
        source = models.find_source(options.model)
        models.load_config(source)  # a compressed folder is refused here, before any work
        return source
    if options.model_path is None:
        found = files.newest_checkpoint(Path(options.save_path), None)
    else:
        found = files.read_checkpoint(options.model_path)
    found.verify()
    return models.Source(found.folder.name, str(found.folder))


def load_judged(options: Namespace, source: models.Source) -> tuple[Any, report.Stopwatch, dict[str, Any]]:
    """The model on its device, a running stopwatch, and what every record of a judged model starts with."""
    device = torch.device(options.DEV)
    watch = report.Stopwatch(device)
    compressed = (Path(source.location) / files.MANIFEST).is_file()
    stored = files.read_checkpoint(source.location).record if compressed else {}
    default = stored.get("dtype") or models.default_dtype_name(source, models.load_config(source), device)
    dtype = options.dtype or default
    model: Any = models.load_model(source, models.DTYPES[dtype])
    return (
        model.to(device),
        watch,
        {
            "command": options.command,
            "model": stored.get("model", options.model),
            "dataset": stored.get("dataset"),
            "path": source.location if compressed else "original",
            "dtype": dtype,
            "seed": options.seed,
            "density": stored.get("density", 1.0),
            "density_model": stored.get("density_model", 1.0),
            "device": report.device_name(device),
        },
    )
