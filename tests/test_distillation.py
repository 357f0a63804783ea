"""--mode finetune --teacher: the loss is the divergence from the teacher, and training lowers it on unseen text."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import PIFA
from component import finetune
from component.finetune_data import IGNORED
from component.finetune_loop import summed_divergence
from tests import tiny
from utils import checkpoint as files
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
