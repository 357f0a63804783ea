"""Judges a model: perplexity and generated text. Knows nothing of how the model was made."""

import time
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from utils import checkpoint as files
from utils import data, models, report
from utils.attention import repeat_heads
from utils.errors import RunError


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


@torch.no_grad()
def continue_text(model: Any, tokenizer: Any, prompt: str, new_tokens: int) -> str:
    """Greedy continuation of a prompt, the prompt included."""
    inputs = tokenizer(prompt, return_tensors="pt").to(next(model.parameters()).device)
    # the tokenizer may know no padding token; generation of a single sequence needs none
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(output[0], skip_special_tokens=True)


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
    model, watch, record = _load(options, source)
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


def run_generate(options: Namespace) -> dict[str, Any]:
    """--mode generate: prints a greedy continuation of --prompt; returns the result record."""
    source = find_model(options)
    tokenizer = models.load_tokenizer(source)
    model, watch, record = _load(options, source)
    text = continue_text(model, tokenizer, options.prompt, options.max_new_tokens)
    print(text)
    return {**record, "mode": "generate", "prompt": options.prompt, "text": text, **watch.readings()}


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


def _load(options: Namespace, source: models.Source) -> tuple[Any, report.Stopwatch, dict[str, Any]]:
    """The model on its device, a running stopwatch, and what every record of this file starts with."""
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
