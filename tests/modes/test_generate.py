"""component/runner/generation.py: what is printed is what the model says, wherever the prompt comes from."""

import io
import json
from types import SimpleNamespace

import pytest
import torch
from transformers import TextStreamer

import PIFA
from component.runner.generation import Sampling, lean_generate, streamed, tokens_of
from component.runner.model import LeanModel
from tests import tiny
from utils.errors import UsageError

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)
NEW = 5


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    folder = tiny.save_model(tmp_path_factory.mktemp("models") / "chat", tiny.build())
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def by_hand(text: str, new: int = NEW) -> str:
    """The likeliest continuation, token by token, without a cache; the text included."""
    model, tokenizer = tiny.build(), tiny.tokenizer()
    tokens = tokenizer(text)["input_ids"]
    for _ in range(new):
        with torch.no_grad():
            tokens.append(model(torch.tensor([tokens])).logits[0, -1].argmax().item())
    return tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.fixture
def said(arguments, capsys):
    """said(flag=value, ...): stdout before the record, and the record."""

    def run(**flags) -> tuple[str, dict]:
        assert PIFA.main(arguments("generate", model_path="original", max_new_tokens=NEW, **flags)) == 0
        text, _, record = capsys.readouterr().out.rstrip("\n").rpartition("\n")
        return text, json.loads(record)

    return run


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_text_is_streamed_and_in_the_record(said):
    text, record = said(prompt="a b")
    assert text == record["text"] == by_hand("a b") and record["prompt"] == "a b"
    assert (record["chat"], record["runner"], record["new_tokens"], record["temperature"]) == (
        False,
        "transformers",
        NEW,
        0,
    )


def test_a_prompt_from_a_file(said, tmp_path):
    (tmp_path / "prompt.txt").write_text("of\nmany lines\n", encoding="utf-8")
    assert said(prompt_file=tmp_path / "prompt.txt")[1]["text"] == by_hand("of\nmany lines")


def test_a_prompt_from_a_pipe(said, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("of\nmany lines\n"))
    assert said(prompt="-")[1]["text"] == by_hand("of\nmany lines")


def test_without_a_terminal_there_is_a_default_prompt(said, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("not read"))
    assert said()[1]["text"] == by_hand("The meaning of life is")


@pytest.mark.parametrize("prompt", [None, "-"])
def test_a_terminal_is_asked_until_an_empty_line(prompt, said, monkeypatch):
    monkeypatch.setattr("sys.stdin", Terminal("a b\nc\n\nnot read\n"))
    text, record = said(prompt=prompt)
    expected = [by_hand("a b"), by_hand("c")]
    assert [turn["text"] for turn in record["turns"]] == expected and record["text"] == expected[1]
    assert text == "\n".join(whole.removeprefix(start) for whole, start in zip(expected, ("a b", "c"), strict=True))


def test_a_terminal_that_says_nothing(said, monkeypatch):
    monkeypatch.setattr("sys.stdin", Terminal(""))
    text, record = said()
    assert text == record["text"] == "" and record["prompt"] is None


def test_a_chat_template_is_used_where_there_is_one(said, chat_folder):
    whole = by_hand("[user]hi[a]")
    text, record = said(model=chat_folder, prompt="hi")
    assert record["chat"] and text == record["text"] == whole.removeprefix("[user]hi[a]")
    assert said(model=chat_folder, prompt="hi", **{"no-chat": True})[1]["text"] == by_hand("hi")


def test_a_chat_remembers_what_was_said(said, chat_folder, monkeypatch):
    monkeypatch.setattr("sys.stdin", Terminal("hi\nso\n"))
    _, record = said(model=chat_folder)
    first, second = (turn["text"] for turn in record["turns"])
    before = f"[user]hi[assistant]{first}[user]so[a]"
    assert second == by_hand(before).removeprefix(before)


def test_special_tokens_of_a_template_are_not_doubled():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "<eos>" + TEMPLATE
    tokens = tokens_of(tokenizer, [{"role": "user", "content": "hi"}])
    assert tokens.tolist()[0] == tokenizer("<eos>[user]hi[a]", add_special_tokens=False)["input_ids"]


def test_sampling_is_decided_by_the_seed(said):
    texts = {seed: [said(prompt="a b", temperature=3.0, seed=seed)[0] for _ in range(2)] for seed in (1, 2)}
    assert texts[1][0] == texts[1][1] != texts[2][0] == texts[2][1]


def test_what_cannot_be_asked(arguments, tmp_path, bad):
    here = {"model_path": "original"}
    bad(arguments("generate", **here, prompt="a", chat=True), "--chat: the tokenizer has no chat template")
    bad(arguments("generate", **here, prompt="a", prompt_file="b"), "--prompt and --prompt_file")
    bad(arguments("generate", **here, prompt_file=tmp_path / "absent"), "no such file")
    bad(arguments("generate", **here, prompt=""), "the prompt is empty")
    bad(arguments("generate", **here, prompt="a", temperature=-1), "--temperature -1 is no number from 0 on")
    bad(arguments("generate", **here, prompt="a", max_new_tokens=0), "--max_new_tokens 0 is below 1")


# ---------------------------------------------------------------- the lean runner, which a GPU is given


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_the_lean_runner_streams_what_it_generates(temperature, capsys):
    model, tokens = tiny.build(), tiny.token_windows(1, 7)
    lean = LeanModel.from_transformers(model, max_length=32)
    sampling = Sampling(max_new_tokens=9, temperature=temperature, seed=4, context=32)
    streamer = TextStreamer(tiny.tokenizer(), skip_special_tokens=True)
    found = streamed(lean, tokens, streamer, sampling=sampling)
    draw = torch.Generator().manual_seed(4)
    assert torch.equal(found, lean.generate(tokens, 9, temperature=temperature, generator=draw))
    assert capsys.readouterr().out == tiny.tokenizer().decode(found[0], skip_special_tokens=True) + "\n"


def test_the_lean_runner_stops_at_the_end_of_text():
    model, tokens = tiny.build(), tiny.token_windows(1, 7)
    first = LeanModel.from_transformers(model, max_length=32).generate(tokens, 1)[0, -1].item()
    model.generation_config.eos_token_id = first
    lean = LeanModel.from_transformers(model, max_length=32)
    quiet = SimpleNamespace(put=lambda tokens: None, end=lambda: None)
    sampling = Sampling(max_new_tokens=9, temperature=0.0, seed=0, context=32)
    assert streamed(lean, tokens, quiet, sampling=sampling).shape == (1, 8)


def test_a_text_longer_than_the_cache_is_refused():
    sampling = Sampling(max_new_tokens=4, temperature=0.0, seed=1, context=8)
    generate = lean_generate(tiny.build(), sampling)
    with pytest.raises(UsageError, match=r"9 \+ 4 tokens do not fit 12"):
        generate(tiny.token_windows(1, 9), TextStreamer(tiny.tokenizer()))
