"""checkpoint/derive.py and choose.py: what goes over into a new checkpoint, and which one it is made from."""

import shutil
from pathlib import Path

import pytest

import PIFA
from component.checkpoint import reading as files
from component.checkpoint.carried import loader_files
from component.checkpoint.choose import find_checkpoint
from tests import tiny
from utils.errors import UsageError

STALE = "# as an older version wrote it\n"
TRAINING = {"order": "full", "max_steps": 1, "batch_size": 2, "micro_batch_size": 2, "cutoff_len": 16}
MODES = {
    "pifa": {},
    "finetune": TRAINING,
    "quantize": {"quantize_method": "rtn", "group_size": 16},
}


@pytest.fixture
def old(compressed, tmp_path) -> Path:
    """A low-rank checkpoint that carries a loader of another day, and a file that is nobody's."""
    folder = shutil.copytree(compressed, tmp_path / "old")
    for path in loader_files():
        (folder / path.name).write_text(STALE)
    (folder / "notes.txt").write_text("mine")
    (folder / ".hidden").write_text("mine")
    return folder


@pytest.mark.parametrize("mode", MODES)
def test_the_loader_is_todays_and_all_else_goes_over(mode, old, arguments, text_file, tmp_path):
    if mode == "quantize":
        pytest.importorskip("compressed_tensors")
    more = {"data_path": [text_file], **MODES[mode]} if mode == "finetune" else MODES[mode]
    folder = Path(PIFA.run(arguments(mode, model_path=old, save_path=tmp_path / "out", **more))["path"])
    for path in loader_files():
        assert (folder / path.name).read_bytes() == path.read_bytes()
    for name in ("notes.txt", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (old / name).read_bytes()
    assert not (folder / ".hidden").exists()
    assert files.read_checkpoint(folder).record["source"] == str(old)


def test_the_newest_is_chosen_or_what_it_was_made_from(compressed, pivoted, tmp_path):
    made = {"first": compressed, "second": pivoted, "third": pivoted}
    for number, (name, source) in enumerate(made.items(), start=1):
        copy = shutil.copytree(source, tmp_path / name)
        tiny.edit_json(
            copy / files.RECORD, lambda record, number=number: record.update(finished_at=f"2024-01-0{number}")
        )
    tiny.edit_json(
        tmp_path / "third" / files.RECORD,
        lambda record: record.update(mode="finetune", source=str(tmp_path / "second")),
    )
    assert find_checkpoint(None, tmp_path).folder.name == "third"
    assert find_checkpoint(None, tmp_path, passed_over=("finetune",)).folder.name == "second"
    assert find_checkpoint(None, tmp_path, kind="lowrank").folder.name == "first"
    # what is named is taken as it is
    assert find_checkpoint(str(tmp_path / "third"), tmp_path, passed_over=("finetune",)).folder.name == "third"


def test_what_will_not_do_is_refused_in_the_modes_own_words(compressed, tmp_path):
    with pytest.raises(UsageError, match=r"^factors, please$"):
        find_checkpoint("original", tmp_path, no_original="factors, please")
    with pytest.raises(UsageError, match=r"^not this one$"):
        find_checkpoint(str(compressed), tmp_path, refusal=lambda source: "not this one")
    with pytest.raises(UsageError, match="no finished pifa checkpoint"):
        find_checkpoint(None, compressed.parent, kind="pifa")
