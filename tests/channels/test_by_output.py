"""component/channels/by_output.py: what narrower heads and MLPs lose at the linear that reads them."""

import pytest
import torch

from component.channels.by_output import (
    channel_curve,
    channel_order,
    head_blocks,
    head_curve,
    head_directions,
    head_metric,
    narrow_output,
    reading_axes,
)
from component.channels.flatllm import absorb_bases, compensated
from tests.tiny import gram_of, rand, relative

HEADS, QUERY_HEADS, HEAD_DIM = 2, 4, 8


def test_a_single_head_in_the_metric_of_its_reader_is_the_truncated_product():
    """Eckart-Young: no rank-w product loses less than O L cut to w."""
    z, weight, width = rand(HEAD_DIM, 200) * torch.arange(1, 9)[:, None], rand(20, HEAD_DIM, seed=1), 3
    moment = gram_of(z)
    bases = reading_axes(moment[None], head_metric(weight, query_heads=1, heads=1), width)
    fitted = narrow_output(weight, weight @ moment, moment, bases=bases, damping=0.0)
    error = (fitted @ bases[0].T @ z - weight @ z).square().sum()
    singular = torch.linalg.svdvals(weight @ torch.linalg.cholesky(moment))
    assert error.item() == pytest.approx(singular[width:].square().sum().item(), rel=1e-6)


def test_without_a_metric_it_is_pca():
    moment = gram_of(rand(HEAD_DIM, 50) * torch.arange(1, 9)[:, None])[None]
    decode, encode = head_directions(moment, torch.eye(HEAD_DIM, dtype=torch.float64)[None])
    assert relative(decode @ encode, torch.eye(HEAD_DIM, dtype=torch.float64)[None]) < 1e-9
    axes = torch.linalg.eigh(moment[0])[1].flip(-1)[:, :3]
    bases = reading_axes(moment, torch.eye(HEAD_DIM, dtype=torch.float64)[None], 3)[0]
    assert relative(bases @ bases.T, axes @ axes.T) < 1e-6


def test_blocks_and_metric_are_sums_over_the_query_heads_of_one():
    z, weight = rand(QUERY_HEADS * HEAD_DIM, 40), rand(9, QUERY_HEADS * HEAD_DIM, seed=1)
    blocks = head_blocks(gram_of(z), query_heads=QUERY_HEADS, heads=HEADS)
    metric = head_metric(weight, query_heads=QUERY_HEADS, heads=HEADS)
    for head in range(HEADS):
        own = [slice(q * HEAD_DIM, (q + 1) * HEAD_DIM) for q in (2 * head, 2 * head + 1)]
        assert relative(blocks[head], sum(gram_of(z[one]) for one in own)) < 1e-12
        assert relative(metric[head], sum(weight[:, one].T @ weight[:, one] for one in own)) < 1e-12


def test_channels_go_as_the_fit_without_them_says():
    """The first to go is the one whose removal, with all others fitted again, loses least; seen by trying all."""
    z, weight = rand(12, 4) @ rand(4, 90, seed=1) + 0.3 * rand(12, 90, seed=2), rand(7, 12, seed=3)
    moment = gram_of(z)
    losses = []
    for out in range(12):
        kept = torch.tensor([i for i in range(12) if i != out])
        fitted = compensated(weight, weight @ moment, moment, kept=kept, damping=1e-9)
        losses.append((fitted @ z[kept] - weight @ z).square().sum().item())
    order = channel_order(weight, moment, 1e-9)
    assert order[-1] == min(range(12), key=losses.__getitem__)
    assert sorted(order.tolist()) == list(range(12))


@pytest.mark.parametrize("weighted", [False, True])
def test_curves_are_the_losses_of_what_is_left(weighted):
    """1/2 E (g . dy)^2 with dy from the channels that are kept, fitted to the same tokens."""
    n, tokens = QUERY_HEADS * HEAD_DIM, 300
    z, weight, g = rand(n, n) @ rand(n, tokens, seed=1), rand(9, n, seed=2), rand(tokens, 9, seed=3)
    moment, weighting = gram_of(z), torch.linalg.cholesky(gram_of(rand(9, 20, seed=4))) if weighted else None
    seen = weight if weighting is None else weighting.T @ weight
    curve = channel_curve(weight, moment, inputs=z.T, gradients=g, weighting=weighting, tokens=10**9)
    order = channel_order(seen, moment, 1e-3)
    for kept in (1, 13, n - 1):
        chosen = order[:kept].sort().values
        fitted = compensated(weight, weight @ moment, moment, kept=chosen, damping=1e-3)
        error = fitted @ z[chosen] - weight @ z
        # the ridge of the curve is of all channels, that of the fit of those that are left
        assert curve[kept].item() == pytest.approx((g.T * error).sum(0).square().mean().item() / 2, rel=0.1)
    assert curve[n] == 0
    few = channel_curve(weight, moment, inputs=z.T, gradients=g, weighting=weighting, tokens=tokens)
    assert relative(few[:n] * (1 - torch.arange(n) / tokens) ** 2, curve[:n]) < 1e-6 and few[n] == 0
    assert (
        channel_curve(weight, moment, inputs=z.T, gradients=g, weighting=weighting, tokens=5)[5:n] > 1e5 * curve[5:n]
    ).all()
    curve = head_curve(
        weight, moment, inputs=z.T, gradients=g, weighting=weighting, query_heads=QUERY_HEADS, heads=HEADS
    )
    blocks, metric = (
        head_blocks(moment, query_heads=QUERY_HEADS, heads=HEADS),
        head_metric(seen, query_heads=QUERY_HEADS, heads=HEADS),
    )
    decode, encode = head_directions(blocks, metric)
    for width in (0, 3, HEAD_DIM - 1):
        back = (decode[:, :, :width] @ encode[:, :width]).repeat_interleave(2, 0)
        left = torch.einsum("qde,qet->qdt", back, z.unflatten(0, (QUERY_HEADS, -1))).flatten(0, 1)
        expected = (g.T * (weight @ (left - z))).sum(0).square().mean().item() / 2
        assert curve[width].item() == pytest.approx(expected, rel=1e-3)
    assert curve[HEAD_DIM] == 0


def test_fitting_heads_to_all_tokens_loses_no_more_than_absorbing():
    z, weight = rand(QUERY_HEADS * HEAD_DIM, 20) @ rand(20, 300, seed=1), rand(9, QUERY_HEADS * HEAD_DIM, seed=2)
    moment = gram_of(z)
    metric = head_metric(weight, query_heads=QUERY_HEADS, heads=HEADS)
    bases = reading_axes(head_blocks(moment, query_heads=QUERY_HEADS, heads=HEADS), metric, 3)
    narrow = torch.einsum("hdw,hqdt->hqwt", bases, z.unflatten(0, (HEADS, -1, HEAD_DIM))).flatten(0, 2)
    fitted, absorbed = (
        narrow_output(weight, weight @ moment, moment, bases=bases, damping=1e-9),
        absorb_bases(weight, bases),
    )
    errors = [(one @ narrow - weight @ z).norm().item() for one in (fitted, absorbed)]
    assert errors[0] < errors[1]
