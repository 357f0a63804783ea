"""Continues a text or answers a chat: where prompts come from, and what generates."""

import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer

from utils.errors import UsageError

log = logging.getLogger("pifa")

DEFAULT_PROMPT = "The meaning of life is"
TERMINAL = "-"
Generate = Callable[[Tensor, TextStreamer], Tensor]  # (1, length) tokens -> (1, length + new) tokens


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How far to go on and how to draw. context: tokens of a prompt that there is room for.

    temperature: 0 takes the likeliest token; what is drawn otherwise is decided by the seed.
    """

    max_new_tokens: int
    temperature: float
    seed: int
    context: int


def reads_terminal(prompt: str | None, prompt_file: str | None) -> bool:
    """Whether prompts are typed: asked for with `-`, or no prompt given, and there is a terminal.

    Raises: UsageError where both are given.
    """
    if prompt is not None and prompt_file is not None:
        raise UsageError("--prompt and --prompt_file both give the prompt: give one")
    return prompt in (None, TERMINAL) and prompt_file is None and sys.stdin.isatty()


def read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    """The prompt where nobody types: the flag's, a file's, or for `-` all of stdin.

    Raises: UsageError where there is no such file.
    """
    if prompt_file is not None:
        path = Path(prompt_file)
        if not path.is_file():
            raise UsageError(f"no such file: {path}")
        return path.read_text(encoding="utf-8").rstrip("\n")
    if prompt == TERMINAL:
        return sys.stdin.read().rstrip("\n")
    return DEFAULT_PROMPT if prompt is None else prompt


def typed_prompts() -> Iterator[str]:
    """One prompt a line, until an empty one or the end of the input. What is asked goes to stderr, as logs do."""
    print("one prompt a line; an empty line ends", file=sys.stderr)
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().rstrip("\n")
        if not line:
            return
        yield line


def chats(asked: bool | None, tokenizer: Any) -> bool:
    """Whether a prompt is a message to answer: as asked, by default where the tokenizer has a chat template.

    Raises: UsageError where it is asked for and there is no template.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if asked and not has_template:
        raise UsageError("--chat: the tokenizer has no chat template; --no-chat continues the text as it is")
    return has_template if asked is None else asked


def take_turns(
    prompts: Iterable[str], generate: Generate, tokenizer: Any, *, chat: bool, typed: bool, device: torch.device
) -> list[dict[str, Any]]:
    """Print what is generated for each prompt as it comes; prompt, text and new_tokens of each.

    typed: whether the prompt stands on the terminal already. Raises: UsageError for an empty prompt.
    """
    turns: list[dict[str, Any]] = []
    messages: list[dict[str, str]] = []
    for prompt in prompts:
        messages.append({"role": "user", "content": prompt})
        tokens = tokens_of(tokenizer, messages if chat else prompt).to(device)
        if not tokens.shape[1]:
            raise UsageError("the prompt is empty, and this tokenizer begins a text with nothing")
        streamer = TextStreamer(tokenizer, skip_prompt=chat or typed, skip_special_tokens=True)
        whole = generate(tokens, streamer)[0]
        answer = tokenizer.decode(whole[tokens.shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
        text = answer if chat else tokenizer.decode(whole, skip_special_tokens=True)
        turns.append({"prompt": prompt, "text": text, "new_tokens": len(whole) - tokens.shape[1]})
    return turns


def tokens_of(tokenizer: Any, prompt: str | list[dict[str, str]]) -> Tensor:
    """(1, length) int64 of a text, or of the messages of a chat up to where the answer begins."""
    if isinstance(prompt, str):
        return tokenizer(prompt, return_tensors="pt")["input_ids"].long()
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    # the template writes its special tokens itself
    return tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].long()


def generator_of(model: Any, tokenizer: Any, sampling: Sampling, *, device: torch.device) -> tuple[Generate, str]:
    """How to generate, and the name of it: the lean runner on a GPU where it knows the model, else transformers."""
    if device.type == "cuda":
        try:
            return lean_generate(model, sampling), "lean"
        except UsageError as error:
            log.info("the lean runner does not take this model (%s): transformers generates", error)

    @torch.no_grad()
    def generate(tokens: Tensor, streamer: TextStreamer) -> Tensor:
        torch.manual_seed(sampling.seed)
        drawing: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:  # plain sampling, as the lean runner's
            drawing = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
        return model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=sampling.max_new_tokens,
            pad_token_id=tokenizer.eos_token_id,  # one sequence needs none, and the tokenizer may have none
            streamer=streamer,
            **drawing,
        )

    return generate, "transformers"


def lean_generate(model: Any, sampling: Sampling) -> Generate:
    """Generation by runner/model.py, its cache as long as a text can become.

    Raises: UsageError where the runner does not do this model.
    """
    from component.runner.model import LeanModel

    longest = getattr(model.config, "max_position_embeddings", None) or sampling.context
    length = min(longest, sampling.context + sampling.max_new_tokens)
    lean = LeanModel.from_transformers(model, max_length=length)

    def generate(tokens: Tensor, streamer: TextStreamer) -> Tensor:
        return streamed(lean, tokens, streamer, sampling=sampling)

    return generate


def streamed(lean: Any, tokens: Tensor, streamer: TextStreamer, *, sampling: Sampling) -> Tensor:
    """What `lean.generate` makes of one sequence, shown token by token. tokens: (1, length).

    Raises: UsageError where the text does not fit the cache.
    """
    new_tokens = sampling.max_new_tokens
    if tokens.shape[1] + new_tokens > lean.max_length:
        raise UsageError(
            f"{tokens.shape[1]} + {new_tokens} tokens do not fit {lean.max_length}: raise --model_seq_len where the "
            "model allows it, or lower --max_new_tokens"
        )
    streamer.put(tokens.cpu())
    whole = lean.generate(
        tokens,
        new_tokens,
        temperature=sampling.temperature,
        generator=torch.Generator(device=tokens.device).manual_seed(sampling.seed),
        seen=lambda column: streamer.put(column[0].cpu()),
    )
    streamer.end()
    return whole
