"""utils/data.py: texts are joined and cut as the papers do, and what can't be read is said in one line."""

import json
import random

import datasets
import pytest
import torch
from datasets.exceptions import DatasetGenerationError

from tests import tiny
from utils import data
from utils.errors import UsageError
from utils.names import DATASETS, check_dataset

TOKENS = torch.arange(1000)
ROWS = ["first row", "", "third = row"]
JOINED = "first row\n\n\n\nthird = row"


@pytest.mark.parametrize("seed", [3, 103])
@pytest.mark.parametrize(("count", "length"), [(5, 64), (40, 7), (3, 999)])
def test_random_windows_start_where_the_reference_starts_them(count, length, seed):
    draw = random.Random(seed)
    starts = [draw.randint(0, len(TOKENS) - length - 1) for _ in range(count)]
    expected = torch.tensor([list(range(start, start + length)) for start in starts])
    assert torch.equal(data.random_windows(TOKENS, count, length, seed=seed), expected)


def test_fewer_random_windows_are_the_first_of_more():
    assert torch.equal(data.random_windows(TOKENS, 8, 32, seed=3)[:5], data.random_windows(TOKENS, 5, 32, seed=3))


@pytest.mark.parametrize(
    ("count", "length", "kept"), [(3, 20, 3), (10, 20, 10), (11, 20, 10), (2, 120, 1), (1, 201, 0)]
)
def test_held_out_windows_are_the_last_of_the_text_and_at_most_a_fifth(count, length, kept, caplog):
    before, windows = data.hold_out(TOKENS, count, length)
    assert windows.shape == (kept, length)
    assert torch.equal(torch.cat([before, windows.flatten()]), TOKENS)
    said = f"{count} windows of {length} are more than a fifth of the text's 1000 tokens: held out are the last {kept}"
    assert caplog.messages == ([said] if kept < count else [])


def test_none_held_out_is_the_whole_text():
    before, windows = data.hold_out(TOKENS, 0, 64)
    assert torch.equal(before, TOKENS) and windows.shape == (0, 64)


@pytest.mark.parametrize(("length", "limit", "count"), [(100, None, 10), (64, None, 15), (64, 4, 4), (64, 99, 15)])
def test_consecutive_windows_are_whole_and_in_order(length, limit, count):
    windows = data.consecutive_windows(TOKENS, length, limit)
    assert windows.shape == (count, length)
    assert torch.equal(windows.flatten(), TOKENS[: count * length])


@pytest.mark.parametrize("cut", [lambda t, n: data.random_windows(t, 2, n, seed=3), data.consecutive_windows])
def test_a_text_shorter_than_a_window_is_refused(cut):
    with pytest.raises(UsageError, match="the text has 1000 tokens, too few for a window of 1001"):
        cut(TOKENS, 1001)


def write_txt(folder):
    path = folder / "text.txt"
    path.write_text(JOINED, encoding="utf-8")
    return path


def write_jsonl(folder):
    path = folder / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": row, "id": 1}) for row in ROWS) + "\n\n", encoding="utf-8")
    return path


def write_parquet(folder):
    path = folder / "text.parquet"
    datasets.Dataset.from_dict({"text": ROWS}).to_parquet(path)
    return path


def write_saved(folder):
    path = folder / "saved"
    datasets.Dataset.from_dict({"text": ROWS}).save_to_disk(path)
    return path


@pytest.mark.parametrize("write", [write_txt, write_jsonl, write_parquet, write_saved])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_path_serves_whole_for_both_splits(write, split, tmp_path):
    """Rows are joined by blank lines, a text file is read as it is."""
    path = write(tmp_path)
    check_dataset(str(path))
    assert data.read_text(str(path), split) == data.Text(str(path), JOINED)


def write_bytes(name: str, content: bytes):
    def write(folder):
        (folder / name).write_bytes(content)
        return folder / name

    return write


def write_two_splits(folder):
    rows = datasets.Dataset.from_dict({"text": ROWS})
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(folder / "saved")
    return folder / "saved"


def write_other_column(folder):
    datasets.Dataset.from_dict({"prose": ROWS}).to_parquet(folder / "other.parquet")
    return folder / "other.parquet"


def write_damaged_parquet(folder):
    """Whole at both ends, so that only reading the rows finds it."""
    path = write_parquet(folder)
    content = bytearray(path.read_bytes())
    content[4:60] = bytes(56)
    path.write_bytes(content)
    return path


def write_damaged_folder(folder):
    path = write_saved(folder)
    for file in path.glob("*.arrow"):
        file.write_bytes(b"nothing")
    return path


UNREADABLE = {
    "not JSON": (write_bytes("a.jsonl", b'{"text": "a"}\n{"text"\n'), "line 2: not JSON"),
    "no text in a row": (write_bytes("a.jsonl", b'{"prose": "a"}\n'), "line 1: each line is an object"),
    "a row that is no object": (write_bytes("a.jsonl", b"3\n"), "line 1: each line is an object"),
    "not UTF-8": (write_bytes("a.txt", b"\xff\xfe\xff"), r"cannot read .*a\.txt: .*utf-8"),
    "not UTF-8 rows": (write_bytes("a.jsonl", b'{"text": "\xff\xfe"}'), r"cannot read .*a\.jsonl: .*utf-8"),
    "not parquet": (write_bytes("a.parquet", b"nothing"), r"cannot read .*a\.parquet"),
    "damaged rows": (write_damaged_parquet, r"cannot read .*text\.parquet"),
    "a damaged saved folder": (write_damaged_folder, r"cannot read .*saved"),
    "a suffix of something else": (write_bytes("a.csv", b"a,b"), "a dataset path is"),
    "a folder of something else": (lambda folder: folder, "is not a folder that"),
    "several splits": (write_two_splits, "name one of"),
    "another column": (write_other_column, "has no column `text`, only prose"),
}


@pytest.mark.parametrize("trouble", UNREADABLE)
def test_an_unreadable_path_is_refused(trouble, tmp_path):
    write, message = UNREADABLE[trouble]
    with pytest.raises(UsageError, match=message):
        data.read_text(str(write(tmp_path)), "train")


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match="wikitext2, ptb, c4, alpaca, pydoc, or a path"):
        check_dataset("wikitext3")


@pytest.mark.parametrize("name", [*DATASETS, None])
def test_known_names_pass(name):
    assert check_dataset(name) is None


def test_pydoc_is_cut_in_two():
    from pydoc_data.topics import topics

    train, test = data.read_text("pydoc", "train").text, data.read_text("pydoc", "test").text
    assert train + test == "\n\n".join(topics.values())
    assert len(test) == pytest.approx(0.1 * len(train + test), abs=1)


@pytest.fixture
def offline(monkeypatch):
    """No hub, and nothing from it prepared before."""
    monkeypatch.setattr(data, "hub_reachable", lambda: False)
    monkeypatch.setattr(data, "_cached", lambda name: False)


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_default_falls_back_to_pydoc_offline_aloud(split, offline, caplog):
    assert data.read_text(None, split) == data.read_text("pydoc", split)
    assert caplog.messages == ["wikitext2 is not cached and the hub can't be reached: using pydoc instead"]


@pytest.mark.parametrize("name", ["wikitext2", "ptb", "c4", "alpaca"])
def test_a_set_that_was_asked_for_is_never_replaced(name, offline):
    with pytest.raises(UsageError, match=f"{name} is not cached"):
        data.read_text(name, "train")


def test_the_default_is_wikitext2_where_it_can_be_had(monkeypatch):
    monkeypatch.setattr(data, "hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: {"text": ROWS})
    assert data.read_text(None, "train") == data.Text("wikitext2", JOINED)


@pytest.mark.parametrize(
    ("name", "split", "asked"),
    [
        ("wikitext2", "train", {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "train"}),
        ("wikitext2", "test", {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test"}),
        ("ptb", "test", {"path": "ptb-text-only/ptb_text_only", "split": "test"}),
        ("c4", "test", {"path": "allenai/c4", "split": "validation"}),
        ("alpaca", "train", {"path": "tatsu-lab/alpaca", "split": "train[:90%]"}),
        ("alpaca", "test", {"path": "tatsu-lab/alpaca", "split": "train[90%:]"}),
    ],
)
def test_named_sets_are_asked_for_by_split(name, split, asked, monkeypatch):
    seen = {}

    def load_dataset(**arguments):
        seen.update(arguments)
        return datasets.Dataset.from_dict({"text": ROWS, "sentence": ROWS})

    monkeypatch.setattr(data, "hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert data.read_text(name, split) == data.Text(name, JOINED)
    assert asked.items() <= seen.items()


@pytest.mark.parametrize("error", [OSError("gone\nsecond line"), ValueError("gone"), DatasetGenerationError("gone")])
def test_a_set_that_fails_to_load_is_refused_in_one_line(error, monkeypatch):
    def load_dataset(**_):
        raise error

    monkeypatch.setattr(data, "hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UsageError, match=r"cannot load dataset ptb \(gone\); give a local file, or pydoc"):
        data.read_text("ptb", "train")


def test_the_hub_is_out_of_reach_in_offline_mode():
    assert data.hub_reachable() is False  # the tests run in it


def test_a_text_is_tokenized_whole():
    text = tiny.text(2000)
    tokens = data.tokenize(tiny.tokenizer(), text)
    assert tokens.dtype == torch.int64 and tokens.shape == (len(text),)
    assert tiny.tokenizer().decode(tokens) == text


def test_calibration_windows_are_cut_as_by_hand(text_file):
    made = data.calibration_windows(tiny.tokenizer(), str(text_file), count=3, length=16, seed=5, held_out=2)
    tokens = data.tokenize(tiny.tokenizer(), tiny.text())
    before, held_out = data.hold_out(tokens, 2, 16)
    assert made.dataset == str(text_file) and torch.equal(made.held_out, held_out) and len(held_out) == 2
    assert torch.equal(made.windows, data.random_windows(before, 3, 16, seed=5))
