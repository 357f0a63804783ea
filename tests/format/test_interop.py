"""Checkpoints in the hands of transformers and peft: adapters, caches, beams, padding, compilation, pipelines."""

import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from component import LowRankLinear, PIFALinear
from tests import tiny

KINDS = ["compressed", "pivoted"]
PROMPT = tiny.token_windows(1, 9)
NEW = 6
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is absent: pip install peft")


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(params=KINDS)
def folder(request):
    return request.getfixturevalue(request.param)


@torch.no_grad()
def logits(model, tokens=PROMPT, **more) -> torch.Tensor:
    return model(tokens, use_cache=False, **more).logits


def greedy(model, tokens: torch.Tensor = PROMPT, **more) -> torch.Tensor:
    mask = more.pop("attention_mask", torch.ones_like(tokens))
    return model.generate(tokens, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, **more)


def test_generation_with_a_cache_is_generation_without(folder):
    model = loaded(folder)
    tokens = PROMPT
    for _ in range(NEW):
        scores = logits(model, tokens)[:, -1]
        scores[:, tiny.EOS] = -torch.inf  # as min_new_tokens does
        tokens = torch.cat([tokens, scores.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(greedy(model), tokens)
    assert torch.equal(greedy(model, use_cache=False), tokens)


def test_beam_search_is_that_of_the_dense_model(folder):
    model = loaded(folder)
    found = greedy(model, num_beams=4)
    dense = loaded(folder).dequantize()
    assert torch.equal(found, greedy(dense, num_beams=4)) and found.shape == (1, PROMPT.shape[1] + NEW)
    scores = [logits(model, tokens)[0].log_softmax(-1) for tokens in (found, greedy(model))]
    sums = [
        s[PROMPT.shape[1] - 1 : -1].gather(-1, t[0, PROMPT.shape[1] :, None]).sum()
        for s, t in zip(scores, (found, greedy(model)), strict=True)
    ]
    assert sums[0] >= sums[1] - 1e-4  # a beam of 4 finds no less likely text than the greedy one here


def test_a_padded_batch_gives_what_each_text_gives_alone(folder):
    model, tokenizer = loaded(folder), AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    texts = ["abc def", "a", "hi jab de fa gib"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    assert batch["attention_mask"].sum(1).unique().numel() == 3
    together = greedy(model, batch["input_ids"], attention_mask=batch["attention_mask"])
    for text, row in zip(texts, together, strict=True):
        alone = greedy(model, tokenizer(text, return_tensors="pt")["input_ids"])
        assert torch.equal(row[-NEW:], alone[0, -NEW:])


def test_compiled_in_one_graph(folder):
    model = loaded(folder)
    expected = logits(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert tiny.relative(logits(compiled), expected) < 1e-5
    torch.compiler.reset()


def test_a_pipeline_generates_text(folder):
    model, tokenizer = loaded(folder), AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer("a b", return_tensors="pt")["input_ids"]
    expected = tokenizer.decode(greedy(model, tokens)[0], skip_special_tokens=True)
    for given in (str(folder), model):
        pipe = pipeline("text-generation", model=given, tokenizer=tokenizer, device="cpu")
        found = pipe("a b", max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
        assert found[0]["generated_text"] == expected


@needs_peft
@pytest.mark.parametrize(("kind", "targets"), [("pivoted", ["pivot", "coeff"]), ("compressed", ["u", "v"])])
def test_adapters_on_the_factors(kind, targets, request):
    """They start as nothing, learn, and merge into a model that says the same."""
    import peft

    folder = request.getfixturevalue(kind)
    base = loaded(folder)
    expected = logits(base)
    linears = [name for name, module in base.named_modules() if isinstance(module, LowRankLinear | PIFALinear)]
    torch.manual_seed(0)  # A is random
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=16, target_modules=targets))
    assert tiny.relative(logits(model), expected) < 1e-6
    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    assert len(trained) == 2 * 2 * len(linears)  # A and B, for two factors of each

    optimizer = torch.optim.SGD(trained.values(), lr=0.01)
    losses = []
    for _ in range(3):
        loss = model(PROMPT, labels=PROMPT).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(tensor.grad is not None for tensor in trained.values())
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]
    changed = logits(model)
    assert tiny.relative(changed, expected) > 1e-4
    merged = model.merge_and_unload()
    assert tiny.relative(logits(merged), changed) < 1e-5
    assert type(merged.get_submodule(linears[0])) is type(loaded(folder).get_submodule(linears[0]))


@needs_peft
def test_an_adapter_is_saved_and_put_back(pivoted, tmp_path):
    import peft

    model = peft.get_peft_model(loaded(pivoted), peft.LoraConfig(r=2, target_modules=["pivot", "coeff"]))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_B" in name:
                tensor.fill_(0.01)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(loaded(pivoted), tmp_path)
    assert torch.equal(logits(again), expected)
