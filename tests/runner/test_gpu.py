"""component/runner/gpu against the plain expressions in float64: on a GPU, or in Triton's interpreter.

Without a GPU: `TRITON_INTERPRET=1 pytest tests/runner/test_gpu.py`, where triton is installed.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from component.runner import ops as kernels
from component.runner.layout import AttentionState, Coefficients, Heads, Layout, Run, Scratch
from component.runner.model import LeanModel
from tests import tiny
from tests.runner.test_model import compressed, reference

pytestmark = tiny.needs_triton

DEVICE = "cuda" if tiny.GPU else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}
DTYPES = [torch.float32, torch.float16]
# a program takes the interpreter 15 ms: a model narrow enough for few of them
NARROW = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 24, "head_dim": 8}
NARROW |= {f"{token}_token_id": 39 for token in ("bos", "eos", "pad")}
NEW = 2 if tiny.INTERPRETED else 4
LAYOUTS = ["whole", "two runs", "scattered", "scattered with biases"]


@pytest.fixture
def fast(monkeypatch):
    """The kernels, taken for every tensor of the device under test but never for float64."""
    from component.runner import gpu
    from component.runner.gpu import attention

    if tiny.INTERPRETED:  # of 70 cached tokens still more parts than have any
        monkeypatch.setattr(attention, "attention_tile", lambda pairs: (64, 3, 4, 2))
    monkeypatch.setattr(kernels, "fast_kernels", lambda x: None if x.dtype == torch.float64 else gpu)
    return gpu


def given(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return tiny.rand(*shape, seed=seed).to(DEVICE, dtype)


def layout(kind: str, *sizes: int, dtype: torch.dtype) -> tuple[int, Layout]:
    """Width of z, and where modules of these sizes lie in it."""
    total = sum(sizes)
    if kind == "whole":
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        runs = tuple(Run(size, start, start) for size, start in zip(sizes, starts, strict=True))
        return total, Layout(sizes, runs, torch.arange(total, device=DEVICE).int(), None)
    if kind == "two runs":  # as a stack of pivoted layers whose pivots come first: [p p ... | np np ...]
        rank = min(sizes) // 3
        runs, column = [], rank * len(sizes)
        for i, size in enumerate(sizes):
            runs.append(Run(rank, rank * i, column - rank))
            column += size - rank
        columns = [j + (r.low if j < r.split else r.high) for r, n in zip(runs, sizes, strict=True) for j in range(n)]
        return total, Layout(sizes, tuple(runs), torch.tensor(columns, device=DEVICE).int(), None)
    columns = torch.randperm(total + 5, generator=torch.Generator().manual_seed(0))[:total].int().to(DEVICE)
    bias = given(total, dtype=dtype, seed=9) if kind.endswith("biases") else None
    return total + 5, Layout(sizes, None, columns, bias)


def wide(value: Any) -> Any:
    """The same in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, tuple):
        parts = [wide(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 17, 32])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_products(fast, groups, tokens, dtype):
    shapes = [(80, 48), (24, 64), (130, 32)][:groups]
    x = given(tokens, sum(k for _, k in shapes), dtype=dtype)
    z = torch.full((tokens, sum(n for n, _ in shapes) + 3), float("nan"), device=DEVICE, dtype=dtype)
    products, start, column = [], 0, 2
    for i, (n, k) in enumerate(shapes):
        products.append(Coefficients(given(n, k, dtype=dtype, seed=i + 1), start, column))
        start, column = start + k, column + n
    scratch = Scratch.on(z.device)
    fast.small_products(x, products, z, scratch=scratch)
    for weight, start, column in products:
        expected = x[:, start : start + weight.shape[1]].double() @ weight.double().T
        assert tiny.relative(z[:, column : column + len(weight)].double(), expected) < TOLERANCE[dtype]
    assert z[:, :2].isnan().all() and z[:, column + len(weight) :].isnan().all()
    assert not scratch.arrivals.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 37])
@pytest.mark.parametrize("kind", [None, "whole", "scattered", "scattered with biases"])
def test_add_and_norm(fast, kind, tokens, dtype):
    d = 80
    hidden, weight = given(tokens, d, dtype=dtype), given(d, dtype=dtype, seed=1)
    update = None
    if kind is not None:
        width, where = layout(kind, d, dtype=dtype)
        update = given(tokens, width, dtype=dtype, seed=2), where
    expected = kernels.add_and_norm(wide(hidden), wide(update), wide(weight), eps=1e-5)
    for found, value in zip(kernels.add_and_norm(hidden, update, weight, eps=1e-5), expected, strict=True):
        assert tiny.relative(found.double(), value) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 37])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_silu_product(fast, kind, tokens, dtype):
    width, where = layout(kind, 300, 300, dtype=dtype)
    z = given(tokens, width, dtype=dtype)
    expected = kernels.silu_product(wide(z), wide(where))
    assert tiny.relative(kernels.silu_product(z, where).double(), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("kind", ["whole", "scattered", "scattered with biases"])
@pytest.mark.parametrize("size", [16, 24])
def test_attention_of_a_prompt_and_of_a_step(fast, size, kind, norms, dtype):
    """70 cached tokens are several tiles and several parts."""
    norm = [given(size, dtype=dtype, seed=i) for i in (5, 6)] if norms else [None, None]
    heads = Heads(4, 2, size, *norm, 1e-6)
    width, where = layout(kind, 4 * size, 2 * size, 2 * size, dtype=dtype)
    angles = torch.arange(80, device=DEVICE)[:, None] * 0.7 ** torch.arange(size // 2, device=DEVICE)
    rotary = torch.cat([angles, angles], 1).cos(), torch.cat([angles, angles], 1).sin()
    cache = torch.zeros(2, 2, 2, 80, size, device=DEVICE, dtype=dtype)
    position = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    prompt, step = given(2 * 70, width, dtype=dtype), given(2, width, dtype=dtype, seed=1)

    def run(z, where, heads, cache, z_step):
        state = AttentionState(heads, rotary, position.zero_(), (cache[0], cache[1]), scale=0.3)
        q = kernels.rotate_and_store(z, where, state)
        scratch = Scratch.on(z.device)
        position.fill_(70)
        y = kernels.decode_attention(z_step, where, state, scratch=scratch)
        assert not scratch.arrivals.any()
        return q, y, cache

    expected = run(wide(prompt), wide(where), wide(heads), wide(cache), wide(step))
    for found, value in zip(run(prompt, where, heads, cache, step), expected, strict=True):
        assert tiny.relative(found.double(), value) < TOLERANCE[dtype]


@pytest.mark.parametrize("kinds", [["dense"], ["pifa"], ["pifa", "dense", "lowrank"]])
@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_are_those_of_transformers(fast, batch, kinds):
    model: nn.Module = compressed(tiny.build("qwen3", **(NARROW if tiny.INTERPRETED else {})), kinds).to(DEVICE)
    tokens = tiny.token_windows(batch, 14).remainder(model.config.vocab_size).to(DEVICE)
    expected = reference(model, tokens, new=NEW)
    assert torch.equal(LeanModel.from_transformers(model, 3, 32).generate(tokens, NEW), expected)
