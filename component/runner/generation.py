"""--mode generate: continues a text or answers a chat, token by token on stdout."""

import logging
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer

import component.format.integration  # noqa: F401  (teaches transformers to load checkpoints)
from evaluater import find_model, load_judged
from utils import models
from utils.errors import UsageError

log = logging.getLogger("pifa")

DEFAULT_PROMPT = "The meaning of life is"
TERMINAL = "-"
Generate = Callable[[Tensor, TextStreamer], Tensor]  # (1, length) tokens -> (1, length + new) tokens


def run(options: Namespace) -> dict[str, Any]:
    """Print what the model makes of the prompt as it comes; returns the result record.

    Raises: UsageError for a prompt that can't be read, or --chat without a chat template.
    """
    talks = reads_terminal(options)
    prompts = _typed() if talks else iter([read_prompt(options)])
    source = find_model(options)
    tokenizer = models.load_tokenizer(source)
    chat = chats(options, tokenizer)
    model, watch, record = load_judged(options, source)
    generate, runner = generator_of(model, options, tokenizer)
    turns = []
    messages: list[dict[str, str]] = []
    for prompt in prompts:
        messages.append({"role": "user", "content": prompt})
        tokens = tokens_of(tokenizer, messages if chat else prompt).to(watch.device)
        if not tokens.shape[1]:
            raise UsageError("the prompt is empty, and this tokenizer begins a text with nothing")
        streamer = TextStreamer(tokenizer, skip_prompt=chat or talks, skip_special_tokens=True)
        found = generate(tokens, streamer)[0]
        answer = tokenizer.decode(found[tokens.shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
        text = answer if chat else tokenizer.decode(found, skip_special_tokens=True)
        turns.append({"prompt": prompt, "text": text, "new_tokens": len(found) - tokens.shape[1]})
    last = turns[-1] if turns else {"prompt": None, "text": "", "new_tokens": 0}
    return {
        **record,
        "mode": "generate",
        **last,
        **({"turns": turns} if len(turns) > 1 else {}),
        "chat": chat,
        "temperature": options.temperature,
        "runner": runner,
        **watch.readings(),
    }


def reads_terminal(options: Namespace) -> bool:
    """Whether prompts are typed: asked for with `-`, or no prompt given, and there is a terminal."""
    if options.prompt is not None and options.prompt_file is not None:
        raise UsageError("--prompt and --prompt_file both give the prompt: give one")
    return options.prompt in (None, TERMINAL) and options.prompt_file is None and sys.stdin.isatty()


def read_prompt(options: Namespace) -> str:
    """The prompt where nobody types: the flag's, a file's, or for `-` all of stdin."""
    if options.prompt_file is not None:
        path = Path(options.prompt_file)
        if not path.is_file():
            raise UsageError(f"no such file: {path}")
        return path.read_text(encoding="utf-8").rstrip("\n")
    if options.prompt == TERMINAL:
        return sys.stdin.read().rstrip("\n")
    return DEFAULT_PROMPT if options.prompt is None else options.prompt


def _typed() -> Iterator[str]:
    """One prompt a line, until an empty one or the end of the input. What is asked goes to stderr, as logs do."""
    print("one prompt a line; an empty line ends", file=sys.stderr)
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().rstrip("\n")
        if not line:
            return
        yield line


def chats(options: Namespace, tokenizer: Any) -> bool:
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if options.chat and not has_template:
        raise UsageError("--chat: the tokenizer has no chat template; --no-chat continues the text as it is")
    return has_template if options.chat is None else options.chat


def tokens_of(tokenizer: Any, prompt: str | list[dict[str, str]]) -> Tensor:
    """(1, length) int64 of a text, or of the messages of a chat up to where the answer begins."""
    if isinstance(prompt, str):
        return tokenizer(prompt, return_tensors="pt")["input_ids"].long()
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    # the template writes its special tokens itself
    return tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].long()


def generator_of(model: Any, options: Namespace, tokenizer: Any) -> tuple[Generate, str]:
    """How to generate, and the name of it: the lean runner on a GPU where it knows the model, else transformers."""
    if torch.device(options.DEV).type == "cuda":
        try:
            return lean_generate(model, options), "lean"
        except UsageError as error:
            log.info("the lean runner does not take this model (%s): transformers generates", error)

    @torch.no_grad()
    def generate(tokens: Tensor, streamer: TextStreamer) -> Tensor:
        torch.manual_seed(options.seed)
        sampling: dict[str, Any] = {"do_sample": False}
        if options.temperature > 0:  # plain sampling, as the lean runner's
            sampling = {"do_sample": True, "temperature": options.temperature, "top_k": 0, "top_p": 1.0}
        return model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=options.max_new_tokens,
            pad_token_id=tokenizer.eos_token_id,  # one sequence needs none, and the tokenizer may have none
            streamer=streamer,
            **sampling,
        )

    return generate, "transformers"


def lean_generate(model: Any, options: Namespace) -> Generate:
    """Generation by runner/model.py, its cache as long as a text can become.

    Raises: UsageError where the runner does not do this model.
    """
    from component.runner.model import LeanModel

    longest = getattr(model.config, "max_position_embeddings", None) or options.model_seq_len
    length = min(longest, options.model_seq_len + options.max_new_tokens)
    lean = LeanModel.from_transformers(model, max_length=length)

    def generate(tokens: Tensor, streamer: TextStreamer) -> Tensor:
        draw = torch.Generator(device=tokens.device).manual_seed(options.seed)
        return streamed(lean, tokens, options.max_new_tokens, options.temperature, draw, streamer)

    return generate


def streamed(
    lean: Any, tokens: Tensor, new_tokens: int, temperature: float, draw: torch.Generator, streamer: TextStreamer
) -> Tensor:
    """What `lean.generate` gives for one sequence, shown token by token. tokens: (1, length).

    Raises: UsageError where the text does not fit the cache.
    """
    if tokens.shape[1] + new_tokens > lean.max_length:
        raise UsageError(
            f"{tokens.shape[1]} + {new_tokens} tokens do not fit {lean.max_length}: raise --model_seq_len where the "
            "model allows it, or lower --max_new_tokens"
        )
    streamer.put(tokens.cpu())
    found = lean.generate(
        tokens, new_tokens, temperature=temperature, generator=draw, seen=lambda column: streamer.put(column[0].cpu())
    )
    streamer.end()
    return found
