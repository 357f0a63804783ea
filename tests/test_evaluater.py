"""evaluater.py: perplexity is the brute-force number, and a loss that is not finite is an error."""

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from evaluater import perplexity
from tests import tiny
from utils.errors import RunError

WINDOWS = tiny.token_windows(5, 24)


def by_hand(model: nn.Module, windows: torch.Tensor) -> float:
    """Token by token, in float64: exp of the mean of -log p(next token)."""
    losses = []
    for window in windows:
        with torch.no_grad():
            scores = model(window[None]).logits[0].double()
        for place in range(len(window) - 1):
            losses.append(-scores[place].log_softmax(dim=-1)[window[place + 1]].item())
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("family", ["llama-gqa", "gemma2", "opt"])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_perplexity_is_the_brute_force_number(family, batch_size):
    model = tiny.build(family)
    result = perplexity(model, WINDOWS, batch_size)
    assert result.ppl == pytest.approx(by_hand(model, WINDOWS), rel=1e-5)
    assert (result.windows, result.tokens) == (5, 5 * 24)


class Fixed(nn.Module):
    """Scores that depend on nothing but the token they follow: log p of the next one is a table."""

    def __init__(self, table: torch.Tensor):
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, tokens, use_cache=False):
        return SimpleNamespace(logits=self.table[tokens])


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary_is_large():
    windows = torch.randint(0, 50, (3, 10), generator=torch.Generator().manual_seed(0))
    assert perplexity(Fixed(torch.zeros(50, 50)), windows, 2).ppl == pytest.approx(50)


def test_half_precision_scores_are_summed_in_float32():
    """50,000 equal scores: their exponentials overflow half precision."""
    table = torch.full((8, 50_000), 3.0, dtype=torch.float16)
    assert perplexity(Fixed(table), WINDOWS % 8, 2).ppl == pytest.approx(50_000, rel=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_an_error_that_names_the_first_window(value, batch_size):
    table = torch.zeros(50, 50)
    table[7, 7] = value
    windows = torch.zeros(5, 10, dtype=torch.int64)
    windows[3:, 4] = 7
    with pytest.raises(RunError, match=r"window 3 \(of 5\)"):
        perplexity(Fixed(table), windows, batch_size)


def test_alone_it_judges_a_compressed_folder(pivoted, tmp_path):
    """In a process that imports nothing else of this project."""
    torch.save(WINDOWS, tmp_path / "windows.pt")
    script = """
import json, sys
import evaluater
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
print(json.dumps([type(model.model.layers[0].mlp.up_proj).__name__,
    evaluater.perplexity(model, torch.load(sys.argv[2]), 2).ppl]))
"""
    command = [sys.executable, "-c", script, str(pivoted), str(tmp_path / "windows.pt")]
    kind, ppl = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert kind == "PIFALinear"
    model = AutoModelForCausalLM.from_pretrained(pivoted).eval()
    assert ppl == pytest.approx(perplexity(model, WINDOWS, 2).ppl, rel=1e-5)
