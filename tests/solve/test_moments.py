"""component/solve/moments.py: sums over batches are the sum over all tokens, in float64."""

import pytest
import torch

from component.solve import moments
from component.solve.moments import add_gram, add_magnitude, add_product
from tests.tiny import rand, relative
from utils.precision import full_precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_batches_add_up_to_the_whole(batch, dtype):
    left, right = rand(5, 7, 4).to(dtype), rand(5, 7, 3, seed=1).to(dtype)
    total = None
    for part_left, part_right in zip(left.split(batch), right.split(batch), strict=True):
        total = add_product(total, part_left, part_right)
    assert total.dtype == torch.float64
    assert relative(total, left.reshape(35, 4).double().T @ right.reshape(35, 3).double()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 5, 8, 13])
@pytest.mark.parametrize("weighs", [False, True])
def test_a_gram_matrix_is_the_product_by_blocks(weighs, size, dtype, monkeypatch):
    monkeypatch.setattr(moments, "LEAST_BLOCK", 2)
    x = rand(5, 7, size).to(dtype)
    w = (2.0 ** (torch.arange(35) % 3 - 1)).view(5, 7, 1).to(dtype)  # exact in every dtype
    total, expected = None, torch.zeros(size, size, dtype=torch.float64)
    for number, part in enumerate(x.split(1)):
        weighted = part * w[number] if weighs else part
        total = add_gram(total, part, weighted if weighs else None)
        expected += part.reshape(7, size).double().T @ weighted.reshape(7, size).double()
    assert total.dtype == torch.float64
    assert relative(total, expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_magnitudes_of_batches_add_up_to_the_whole(batch, dtype):
    x = rand(5, 7, 4).to(dtype)
    total = None
    for part in x.split(batch):
        total = add_magnitude(total, part)
    assert total.dtype == torch.float64
    torch.testing.assert_close(total, x.reshape(35, 4).double().abs().sum(0), rtol=1e-12, atol=0)


def test_a_small_batch_counts_beside_a_large_total():
    """In float32 the 1 would be lost."""
    total = torch.full((1, 1), 1e9, dtype=torch.float64)
    assert add_product(total, torch.ones(1, 1), torch.ones(1, 1)).item() == 1e9 + 1


@pytest.mark.parametrize("before", ["highest", "high"])
def test_full_precision_is_given_back(before):
    original = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(before)
    try:
        with pytest.raises(KeyError), full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
            raise KeyError
        assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision(original)
