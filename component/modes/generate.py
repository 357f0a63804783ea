"""--mode generate: continues a text or answers a chat, token by token on stdout."""

from dataclasses import replace
from typing import Any

from component.modes import shared
from component.modes.parser import Flag, Options, at_least, from_zero

SUMMARY = "Continue a text, or answer a chat."
TEXT = "text"
FLAGS = (
    shared.SUBJECT,
    shared.MODEL_PATH,
    shared.SAVE_PATH,
    Flag(
        "prompt", "Text to continue; - reads it from the terminal or a pipe.", TEXT,
        shown="the terminal, if there is one", metavar="TEXT",
    ),
    Flag("prompt_file", "File with the text to continue.", TEXT, metavar="FILE"),
    Flag("max_new_tokens", "Tokens that are added at most.", TEXT, kind=int, default=40, check=at_least(1)),
    Flag(
        "temperature", "Temperature of sampling; 0 takes the likeliest token.", TEXT, kind=float, default=0.0,
        check=from_zero,
    ),
    Flag(
        "chat", "Take the prompt as a message to answer.", TEXT, kind=bool, negatable=True,
        shown="on where the tokenizer has a chat template",
    ),
    replace(
        shared.MODEL_SEQ_LEN, help="Tokens of a prompt at most, for the cache of the lean runner.", group=TEXT,
        default=shared.by_device(512, 2048, announced=False),
    ),
    replace(shared.SEED, help="Seed of sampling.", group=TEXT),
    shared.DEV,
    shared.DTYPE,
)  # fmt: skip


check = shared.check_subject


def run(options: Options) -> dict[str, Any]:
    """Print what the model makes of the prompt as it comes; returns the result record.

    Raises: UsageError for a prompt that can't be read, or --chat without a chat template.
    """
    import component.runner.generation as generation
    from component.modes.subject import find_subject, load_judged

    typed = generation.reads_terminal(options.prompt, options.prompt_file)
    single = None if typed else generation.read_prompt(options.prompt, options.prompt_file)
    prompts = generation.typed_prompts() if single is None else iter([single])
    source, tokenizer = find_subject(options)
    chat = generation.chats(options.chat, tokenizer)
    model, watch, record = load_judged(source, options)
    sampling = generation.Sampling(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
        context=options.model_seq_len,
    )
    generate, runner = generation.generator_of(model, tokenizer, sampling, device=watch.device)
    turns = generation.take_turns(prompts, generate, tokenizer, chat=chat, typed=typed, device=watch.device)
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
