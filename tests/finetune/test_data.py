"""component/finetune/data.py: what is learned of instructions and texts, and how they are mixed."""

import json
from collections import Counter

import pytest
import torch

from component.finetune import data
from tests import tiny
from utils.errors import UsageError


def test_the_prompt_is_read_and_the_answer_is_learned(instructions):
    tokenizer = tiny.tokenizer()
    rows = data.read_rows(str(instructions), tokenizer, 200)
    assert len(rows) == 5  # a line separator inside a string ends no line
    tokens, labels = data.collate(rows)
    for row, words, targets in zip(rows, tokens, labels, strict=True):
        learned = targets[targets != data.IGNORED]
        assert learned[-1] == tokenizer.eos_token_id
        answer = tokenizer.decode(learned[:-1])
        assert answer.split(" ")[0] in ("one", "two", "three", "four", "five") and "\u2028" in answer
        prompt = tokenizer.decode(words[: row.given])
        assert prompt.endswith("### Response:\n") and answer.split(" ")[0] in prompt
        assert (targets[: row.given] == data.IGNORED).all()
        assert (targets[len(row.tokens) :] == data.IGNORED).all()
        assert torch.equal(targets[row.given : len(row.tokens)], row.tokens[row.given :])
    assert ["### Input:\naloud" in tokenizer.decode(row.tokens) for row in rows] == [False, True, False, True, False]


def test_a_long_answer_is_cut_and_a_prompt_without_room_for_one_is_left_out(tmp_path):
    tokenizer = tiny.tokenizer()
    path = tmp_path / "tasks.json"
    short, long = {"instruction": "a", "output": "b" * 90}, {"instruction": "c" * 90, "output": "d"}
    path.write_text(json.dumps([short, long]))
    (row,) = data.read_rows(str(path), tokenizer, 64)
    assert len(row.tokens) == 64 and row.tokens[-1] == ord("b") - ord("!")  # of the byte alphabet
    with pytest.raises(UsageError, match="--cutoff_len"):
        data.read_rows(str(path), tokenizer, 8)


def test_text_is_packed_into_windows_of_targets(text_file):
    tokenizer = tiny.tokenizer()
    rows = data.read_rows(str(text_file), tokenizer, 50)
    joined = torch.cat([row.tokens for row in rows])
    assert tokenizer.decode(joined) == text_file.read_text()[: len(joined)]
    assert all(len(row.tokens) == 50 and row.given == 0 for row in rows)


@pytest.mark.parametrize(
    "content, word",
    [("[1]", "objects"), ('[{"instruction": "a"}]', "output"), ("{", "cannot read"), ('[{"output": "a"}]', "instr")],
)
def test_a_damaged_instruction_file_is_refused(content, word, tmp_path):
    path = tmp_path / "tasks.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=word):
        data.read_rows(str(path), tiny.tokenizer(), 64)


def test_a_mixture_is_parsed(text_file, tmp_path):
    odd = tmp_path / "a:1"
    odd.write_text("a")
    assert data.parse_mixture([f"{text_file}:0.02", "pydoc:0.98"]) == [(str(text_file), 0.02), ("pydoc", 0.98)]
    assert data.parse_mixture([str(odd), "pydoc"]) == [(str(odd), None), ("pydoc", None)]
    for wrong in ([f"{text_file}:1", "pydoc"], ["pydoc:0"], ["pydoc:-1", "ptb:2"], ["pydoc:inf"], ["nothing"]):
        with pytest.raises(UsageError):
            data.parse_mixture(wrong)


def test_draws_keep_the_shares_and_use_every_row_before_one_comes_again():
    drawn = data.draw([3, 50], [0.02, 0.98], total=500, seed="seed")
    assert Counter(source for source, _ in drawn) == {0: 10, 1: 490}
    for source, count in enumerate([3, 50]):
        rows = [row for s, row in drawn if s == source]
        for start in range(0, len(rows) - count + 1, count):
            assert sorted(rows[start : start + count]) == list(range(count))
    assert (
        drawn
        == data.draw([3, 50], [0.02, 0.98], total=500, seed="seed")
        != data.draw([3, 50], [0.02, 0.98], total=500, seed="other")
    )
    assert sum(data.quotas([1, 1, 1], 100)) == 100
