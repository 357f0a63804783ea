"""--mode finetune --teacher: the loss is the divergence from the teacher, on given text and on its own."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import PIFA
from component.checkpoint import reading as files
from component.finetune import folder as finetune
from component.finetune import self_text
from component.finetune.data import IGNORED, Row
from component.finetune.loop import summed_divergence
from tests import tiny
from utils.errors import UsageError

QUICK = ["--order", "full", "--max_steps", "8", "--batch_size", "8", "--micro_batch_size", "4", "--cutoff_len", "32"]


def test_the_divergence_is_that_of_the_distributions_at_the_targets():
    torch.manual_seed(0)
    logits, wanted = torch.randn(2, 5, 7, dtype=torch.float64), torch.randn(2, 5, 7, dtype=torch.float64)
    labels = torch.randint(7, (2, 5))
    labels[0, :3] = IGNORED
    expected = 0.0
    for row, place in [(0, 3), (0, 4), (1, 1), (1, 2), (1, 3), (1, 4)]:  # of the targets; the one before predicts it
        p, q = (t[row, place - 1].softmax(-1) for t in (wanted, logits))
        expected += (p * (p / q).log()).sum().item()
    assert summed_divergence(logits, wanted, labels).item() == pytest.approx(expected, rel=1e-5)
    assert summed_divergence(wanted, wanted, labels).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", ["compressed", "pivoted"])
def test_the_student_comes_closer_to_its_teacher_on_text_it_has_not_seen(
    kind, request, model_folder, text_file, tmp_path
):
    folder = request.getfixturevalue(kind)
    command = ["--mode", "finetune", "--model_path", folder, "--save_path", tmp_path, "--DEV", "cpu", *QUICK]
    command += ["--data_path", text_file, "--learning_rate", "1e-3", "--teacher", "original"]
    record = PIFA.run([str(word) for word in command])
    assert record["finetune"]["teacher"] == "original"
    windows = tiny.token_windows(4, 32)
    with torch.no_grad():
        teacher, before, after = (
            AutoModelForCausalLM.from_pretrained(path)(windows).logits
            for path in (model_folder, folder, record["path"])
        )
    assert summed_divergence(after, teacher, windows) < summed_divergence(before, teacher, windows)


def test_a_teacher_with_other_words_is_refused(pivoted, tmp_path):
    other = tiny.save_model(tmp_path / "other", tiny.build(vocab_size=300))
    with pytest.raises(UsageError, match="300 words"):
        finetune.find_teacher(str(other), files.read_checkpoint(pivoted))


def test_beginnings_are_stretches_of_the_given_texts():
    rows = [Row(torch.arange(100, 160), 0), Row(torch.arange(5), 0), Row(torch.arange(300, 316), 0)]
    found = self_text.beginnings(rows, 50, seed=1)
    assert found.shape == (50, self_text.BEGINNING) and torch.equal(found, self_text.beginnings(rows, 50, seed=1))
    assert (found.diff(dim=1) == 1).all() and set(found[:, 0].tolist()) <= {*range(100, 145), 300}
    assert len(set(found[:, 0].tolist())) > 10
    with pytest.raises(UsageError, match="16 tokens"):
        self_text.beginnings(rows[1:2], 1, seed=1)


@pytest.mark.parametrize("lean", [True, False])
def test_the_teacher_writes_on_from_its_own_distribution(lean, monkeypatch):
    """Of two likely tokens one ends a text: another follows it, and both come as often as they are likely."""
    model = tiny.build()
    logits = torch.full((tiny.SHAPE["vocab_size"],), -30.0)
    logits[7], logits[tiny.EOS] = 1.0, 0.0

    if not lean:
        monkeypatch.setattr(self_text, "_lean_writer", lambda *_, **__: None)
        forward = model.forward

        def always(*args, **kwargs):
            found = forward(*args, **kwargs)
            found.logits = logits.expand_as(found.logits)
            return found

        model.forward = always
    else:
        from component.runner import model as runner

        monkeypatch.setattr(
            runner.LeanModel, "_forward", lambda self, tokens, every_position: logits.expand(len(tokens), -1)
        )
        monkeypatch.setattr(runner, "PROBE_TOLERANCE", {torch.float32: 1e9})
    started = tiny.token_windows(60, self_text.BEGINNING)
    found = self_text.continued(model, started, length=40, seed=2)
    assert found.shape == (60, 40) and torch.equal(found[:, : self_text.BEGINNING], started)
    written = found[:, self_text.BEGINNING :]
    assert set(written.unique().tolist()) == {7, tiny.EOS}
    share = torch.tensor([0.0, 1.0]).softmax(0)[1].item()
    assert (written == 7).float().mean().item() == pytest.approx(
        share, abs=4 * (share * (1 - share) / written.numel()) ** 0.5
    )
    assert len({tuple(row.tolist()) for row in written}) > 50


def test_what_it_wrote_is_kept_and_learned_from(pivoted, text_file, tmp_path):
    command = ["--mode", "finetune", "--model_path", pivoted, "--save_path", tmp_path, "--DEV", "cpu", *QUICK]
    command += ["--teacher", "original", "--data_path", f"{text_file}:0.25", "self:0.75"]
    record = PIFA.run([str(word) for word in command])
    (kept,) = tmp_path.glob("*-self-*.safetensors")
    assert files.open_shard(kept)["tokens"].shape == (48, 32)
    assert [(entry["rows"], entry["passes"]) for entry in record["finetune"]["data"] if entry["name"] == "self"] == [
        (48, 1)
    ]
    before = kept.read_bytes()
    assert PIFA.run([str(word) for word in [*command, "--resume"]]) == record and kept.read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data_path", "self:1", "--teacher", "original"], "beside a text"),
        (["--data_path", "self", "pydoc", "--teacher", "original"], "with weights"),
        (["--data_path", "self:1", "pydoc:1"], "--teacher"),
        (["--data_path", "self:0.001", "pydoc:1", "--teacher", "original"], "less than a row"),
    ],
)
def test_what_cannot_be_written_is_refused(flags, words, pivoted, tmp_path):
    command = ["--mode", "finetune", "--model_path", str(pivoted), "--save_path", str(tmp_path), "--DEV", "cpu", *QUICK]
    with pytest.raises(UsageError, match=words):
        PIFA.run([*command, *flags])
    assert not list(tmp_path.iterdir())
