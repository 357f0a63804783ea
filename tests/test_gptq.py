"""component/gptq.py and component/packed.py: what rounding costs, and what packing keeps."""

import pytest
import torch
from torch.nn import functional as F

from component.gptq import Quantized, gptq, gptq_together, refit, round_to_nearest
from component.packed import PackedLinear, unpack
from tests import tiny


def correlated(width: int) -> torch.Tensor:
    return tiny.gram_of(tiny.rand(width, width, seed=1) @ tiny.rand(width, 4 * width, seed=2))


def loss(found: Quantized, weight, hessian, group_size: int) -> float:
    error = found.dequantized(group_size) - weight
    return torch.trace(error @ hessian @ error.T).item()


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [8, 16, 40, 256])
def test_gptq_loses_less_than_rounding_to_nearest(bits, group_size, act_order):
    weight, hessian = tiny.rand(24, 72), correlated(72)
    by_itself = loss(round_to_nearest(weight, bits, group_size, "w"), weight, hessian, group_size)
    assert loss(gptq(weight, hessian, bits, group_size, act_order, "w"), weight, hessian, group_size) < 0.8 * by_itself


@pytest.mark.parametrize("act_order", [True, False])
def test_what_is_on_a_grid_already_stays(act_order):
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (12, 40), generator=draw)
    codes[:, ::8], codes[:, 1::8] = 0, 15
    given = Quantized(codes.byte(), 2.0 ** torch.randint(-9, 0, (12, 5), generator=draw).half(), torch.full((12, 5), 7))
    weight = given.dequantized(8)
    for found in (gptq(weight, correlated(40), 4, 8, act_order, "w"), round_to_nearest(weight, 4, 8, "w")):
        assert torch.equal(found.codes, given.codes)
        assert torch.equal(found.dequantized(8), weight)


def test_rows_make_up_for_each_other_in_a_metric():
    """What two factors give is nearer; where every row counts by itself nothing changes."""
    inner, hessian = tiny.rand(48, 72), correlated(72)
    outer = torch.cat([torch.eye(48), tiny.rand(40, 6, seed=5) @ tiny.rand(6, 48, seed=6)]).double()
    metric = outer.T @ outer

    def error(found):
        e = outer @ (found.dequantized(8) - inner)
        return torch.trace(e @ hessian @ e.T)

    alone = gptq(inner, hessian, 4, 8, True, "w")
    assert error(gptq_together(inner, hessian, metric, 4, 8, True, "w")) < 0.6 * error(alone)
    same = gptq_together(inner, hessian, torch.eye(48), 4, 8, True, "w")
    assert all(torch.equal(a, b) for a, b in zip(same, alone, strict=True))
    lacking = gptq_together(inner, hessian, metric - torch.eye(48), 4, 8, True, "w")
    assert error(lacking).isfinite() and lacking.codes.shape == inner.shape


def test_refit_lowers_the_error_of_the_product():
    outer, inner, gram = tiny.rand(20, 8), tiny.rand(8, 24, seed=3), correlated(24)
    rounded = round_to_nearest(inner, 4, 8, "p").dequantized(8)

    def error(c):
        e = c @ rounded - outer @ inner
        return torch.trace(e @ gram @ e.T)

    assert error(refit(outer, inner, rounded, gram, "c")) < error(outer)
    assert torch.equal(refit(outer, inner, inner, gram, "c"), outer)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(12, 40), (7, 19), (0, 8)])
def test_packed_codes_come_back(bits, shape):
    pytest.importorskip("compressed_tensors")
    from utils.packing import pack_columns, pack_rows

    found = round_to_nearest(tiny.rand(*shape), bits, 8, "w")
    rows, columns = pack_rows(found.codes, bits), pack_columns(found.zeros, bits)
    assert torch.equal(unpack(rows, bits, shape[1]), found.codes)
    assert rows.shape == (shape[0], -(-shape[1] * bits // 32))
    layer = PackedLinear.from_packed(rows, found.scales, columns, shape, bits, 8, None, torch.float32)
    assert torch.equal(layer.dequantized(torch.float32).double(), found.dequantized(8))
    x = torch.randn(3, shape[1])
    assert torch.equal(layer(x), F.linear(x, layer.weight))
