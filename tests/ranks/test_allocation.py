"""component/ranks/allocation.py: ranks meet the density asked from below, for any shapes."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from component.ranks.allocation import (
    ALLOCATIONS,
    Allocation,
    atp,
    by_type,
    iprs,
    mlp_density,
    owl,
    reads_profile,
    uniform,
)
from component.ranks.budget import Budget, Module, plan_of
from component.ranks.by_loss import ASVD_RATIOS, asvd, by_loss
from component.ranks.cost import LOW_RANK, PIVOTED
from component.ranks.sizes import DENSE, Plan, Rank, numbers_of
from utils.errors import UsageError

FORMATS = [PIVOTED, LOW_RANK]


def decoder(width: int = 576, keys: int = 192, mlp: int = 1536, layers: int = 3) -> list[Module]:
    """Modules of a LLaMA: keys < width are grouped queries, mlp != width is an MLP that is not square."""
    shapes = {
        "self_attn.q_proj": (width, width), "self_attn.k_proj": (keys, width), "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, width), "mlp.gate_proj": (mlp, width), "mlp.up_proj": (mlp, width),
        "mlp.down_proj": (width, mlp),
    }  # fmt: skip
    return [
        Module(f"layers.{layer}.{name}", *shape, attention=name.startswith("self_attn"), layer=layer)
        for layer in range(layers)
        for name, shape in shapes.items()
    ]


def numbers(modules) -> int:
    return sum(module.numbers for module in modules)


def stored(plan, modules, storage) -> int:
    return sum(storage.stored(plan[module.name].number, module.d_out, module.d_in) for module in modules)


def one_rank(plan, modules, storage) -> int:
    """What one more rank in every compressed module would cost."""
    ranks = numbers_of(plan)
    return sum(
        storage.stored(ranks[m.name] + 1, m.d_out, m.d_in) - storage.stored(ranks[m.name], m.d_out, m.d_in)
        for m in modules
        if ranks[m.name] is not None
    )


WIDTHS = st.sampled_from([32, 48, 64, 96, 160])
DECODERS = st.builds(decoder, WIDTHS, st.sampled_from([16, 32]), WIDTHS, st.integers(1, 3))


@pytest.mark.parametrize("storage", FORMATS, ids=lambda storage: storage.name)
@given(modules=DECODERS, density=st.floats(0.2, 1.0))
def test_uniform_never_exceeds_the_density_and_misses_by_less_than_a_rank(storage, modules, density):
    plan = uniform(Budget(modules, density, storage))
    assert list(plan) == [module.name for module in modules]
    asked = density * numbers(modules)
    assert stored(plan, modules, storage) <= asked * (1 + 1e-9)
    # a module that is one rank short of dense can't be given one more: dense costs more than the last rank
    spare = sum(
        module.numbers - storage.stored(plan[module.name].number, module.d_out, module.d_in)
        for module in modules
        if plan[module.name] == Rank(min(module.d_out, module.d_in) - 1)
    )
    assert stored(plan, modules, storage) + one_rank(plan, modules, storage) + max(spare, 0) >= asked * (1 - 1e-9)
    for module in modules:
        if plan[module.name] is not DENSE:
            assert (
                storage.stored(plan[module.name].number, module.d_out, module.d_in) <= density * module.numbers + 1e-6
            )


@pytest.mark.parametrize("storage", FORMATS, ids=lambda storage: storage.name)
@given(modules=DECODERS, density=st.floats(0.4, 0.9), share=st.floats(0.6, 1.4))
def test_by_type_holds_the_whole_density(storage, modules, density, share):
    attention = density * share
    budget = Budget(modules, density, storage, attention_density=attention)
    try:
        mlp = mlp_density(modules, density, attention)
    except UsageError:
        mlp = None
    if mlp is None or mlp < 0.2 or attention > 1:  # what can't be balanced has its own test below
        return
    kinds = [(attention, [m for m in modules if m.attention]), (mlp, [m for m in modules if not m.attention])]
    total = sum(kind_density * numbers(kind) for kind_density, kind in kinds)
    assert total == pytest.approx(density * numbers(modules))
    plan = by_type(budget)
    for kind_density, kind in kinds:
        alone = uniform(Budget(kind, kind_density, storage))
        assert {module.name: plan[module.name] for module in kind} == alone
    assert stored(plan, modules, storage) <= density * numbers(modules) * (1 + 1e-9)


@pytest.mark.parametrize(("width", "keys", "mlp"), [(64, 64, 64), (64, 64, 172), (64, 16, 96), (96, 32, 64)])
def test_mlp_density_is_counted_from_the_shapes(width, keys, mlp):
    """Square, a LLaMA's MLP, grouped queries, an MLP narrower than the model."""
    modules = decoder(width, keys, mlp)
    attention_numbers = 3 * (2 * width * width + 2 * keys * width)
    mlp_numbers = 3 * 3 * width * mlp
    density = mlp_density(modules, 0.6, 0.5)
    assert density == pytest.approx((0.6 * (attention_numbers + mlp_numbers) - 0.5 * attention_numbers) / mlp_numbers)


def test_mlp_density_of_equal_densities_is_the_same():
    assert mlp_density(decoder(), 0.55, 0.55) == pytest.approx(0.55)
    plans = [
        by_type(Budget(decoder(), 0.55, PIVOTED, attention_density=0.55)),
        by_type(Budget(decoder(), 0.55, PIVOTED)),  # without --attn_ratio
        uniform(Budget(decoder(), 0.55, PIVOTED)),
    ]
    assert plans[0] == plans[1] == plans[2]


@pytest.mark.parametrize(("density", "attention"), [(0.9, 0.05), (0.2, 1.0)])
def test_an_attention_density_that_no_mlp_balances_is_refused_with_the_range_that_works(density, attention):
    modules = decoder(96, 96, 64)
    with pytest.raises(UsageError, match="attention ratio between") as caught:
        by_type(Budget(modules, density, PIVOTED, attention_density=attention))
    least, most = (float(word) for word in str(caught.value).split("between ")[1].split(" would")[0].split(" and "))
    middle = 1 - (least + most) / 2
    assert 0 < mlp_density(modules, density, middle) <= 1


def test_a_model_of_one_type_has_nothing_to_balance():
    modules = [module for module in decoder() if module.attention]
    with pytest.raises(UsageError, match="outside of it"):
        by_type(Budget(modules, 0.6, PIVOTED, attention_density=0.5))


def test_density_one_keeps_every_module_dense():
    assert set(uniform(Budget(decoder(), 1.0, PIVOTED)).values()) == {DENSE}


@pytest.mark.parametrize("storage", FORMATS, ids=lambda storage: storage.name)
def test_a_density_without_a_rank_is_refused_with_the_least_that_works(storage):
    modules = decoder(64, 16, 96)
    with pytest.raises(UsageError, match=r"leaves layers\.0\.self_attn") as caught:
        uniform(Budget(modules, 0.001, storage))
    first = modules[0]
    assert f"at least {storage.numbers(1, first.d_out, first.d_in) / first.numbers:.4f}" in str(caught.value)


def test_every_allocation_has_a_name():
    named = {"uniform": uniform, "type": by_type, "atp": atp, "owl": owl, "iprs": iprs, "asvd": asvd, "kl": by_loss}
    assert named == {name: one.share_out for name, one in ALLOCATIONS.items()}
    assert [name for name in ALLOCATIONS if reads_profile(name)] == ["owl", "iprs", "asvd", "kl"]
    assert not reads_profile("plan.json")


def curves_of(modules, seed: int) -> dict[str, list[float]]:
    """Falling, convex losses of different size and decay."""
    draw = np.random.default_rng(seed)
    curves = {}
    for module in modules:
        ranks = np.arange(min(module.d_out, module.d_in) + 1)
        decay = draw.uniform(1, 6) * ranks / len(ranks)
        curves[module.name] = list(draw.lognormal(0, 2) * (np.exp(-decay) - np.exp(-decay[-1])))
    return curves


def loss(plan, budget) -> float:
    return sum(budget.curves[name][-1 if rank is None else rank] for name, rank in numbers_of(plan).items())


@pytest.mark.parametrize("storage", FORMATS, ids=lambda storage: storage.name)
@given(modules=DECODERS, density=st.floats(0.3, 0.95), seed=st.integers(0, 99))
def test_by_loss_stays_within_the_density_and_loses_no_more_than_uniform(storage, modules, density, seed):
    budget = Budget(modules, density, storage, curves=curves_of(modules, seed))
    plan = by_loss(budget)
    assert list(plan) == [module.name for module in modules]
    assert stored(plan, modules, storage) <= density * numbers(modules) * (1 + 1e-9)
    assert loss(plan, budget) <= loss(uniform(budget), budget) * 1.05 + 1e-9


def test_by_loss_is_near_the_best_of_all_plans():
    modules = [
        Module("a", 12, 10, attention=True),
        Module("b", 10, 14, attention=False),
        Module("c", 9, 9, attention=False),
    ]
    budget = Budget(modules, 0.8, PIVOTED, curves=curves_of(modules, 1))
    options = [[*range(1, min(m.d_out, m.d_in)), None] for m in modules]
    plans = (
        {name: Rank.or_dense(rank) for name, rank in zip("abc", ranks, strict=True)}
        for ranks in itertools.product(*options)
    )
    affordable = [plan for plan in plans if stored(plan, modules, PIVOTED) <= 0.8 * numbers(modules)]
    best = min(loss(plan, budget) for plan in affordable)
    assert best <= loss(by_loss(budget), budget) <= 1.3 * best


def test_by_loss_keeps_the_dearest_module_dense_where_the_budget_allows():
    modules = decoder(layers=1)
    curves = curves_of(modules, 3)
    curves[modules[0].name] = [1e3 * value for value in curves[modules[0].name]]
    assert by_loss(Budget(modules, 0.7, PIVOTED, curves=curves))[modules[0].name] is DENSE


SCORES = st.lists(st.floats(0.5, 1.0), min_size=3, max_size=3)


@given(scores=SCORES, density=st.floats(0.3, 0.8), ratio=st.sampled_from([None, 0.9, 1.05]))
def test_owl_and_iprs_hold_the_density_and_follow_the_scores(scores, density, ratio):
    modules = decoder(64, 32, 96, layers=3)
    attention = None if ratio is None else ratio * density
    budget = Budget(modules, density, PIVOTED, attention_density=attention, outliers=scores, influence=scores)
    for allocate in (owl, iprs):
        plan = allocate(budget)
        assert stored(plan, modules, PIVOTED) <= density * numbers(modules) * (1 + 1e-9)
        ranks = [plan[f"layers.{layer}.mlp.up_proj"].number or 64 for layer in np.argsort(scores)]
        assert ranks == sorted(ranks)


def test_owl_without_spread_is_uniform():
    modules = decoder(layers=2)
    budget = Budget(modules, 0.6, PIVOTED, outliers=[0.1, 0.1])
    assert owl(budget) == uniform(budget)


def test_iprs_caps_at_dense_and_gives_the_rest_away():
    modules = decoder(layers=2)
    plan = iprs(Budget(modules, 0.75, PIVOTED, influence=[9.0, 1.0]))
    assert all(size is DENSE for name, size in plan.items() if name.startswith("layers.0."))
    spent = stored(plan, modules, PIVOTED)
    assert 0.74 < spent / numbers(modules) <= 0.75


@given(modules=DECODERS, density=st.floats(0.3, 0.95), slope=st.floats(0, 0.6))
def test_atp_holds_the_density_and_falls_with_depth(modules, density, slope):
    plan = atp(Budget(modules, density, PIVOTED), slope)
    assert stored(plan, modules, PIVOTED) <= density * numbers(modules) * (1 + 1e-9)
    full = min(modules[0].d_out, modules[0].d_in)
    ranks = [plan[m.name].number or full for m in modules if m.name.endswith("q_proj")]
    assert ranks == sorted(ranks, reverse=True)


def test_atp_without_slope_is_uniform_and_with_it_a_straight_line():
    modules = decoder(layers=5)
    budget = Budget(modules, 0.5, LOW_RANK)
    assert atp(budget, 0.0) == uniform(budget)
    line = [[m for m in modules if m.layer == layer] for layer in range(5)]
    plan = atp(budget, 0.2)
    densities = [stored(plan, layer, LOW_RANK) / numbers(layer) for layer in line]
    assert densities == pytest.approx([0.6, 0.55, 0.5, 0.45, 0.4], abs=0.005)


@pytest.mark.parametrize("storage", FORMATS, ids=lambda storage: storage.name)
@given(modules=DECODERS, density=st.floats(0.3, 0.95), seed=st.integers(0, 99))
def test_asvd_stays_within_the_density_on_its_grid_and_below_one_threshold(storage, modules, density, seed):
    budget = Budget(modules, density, storage, curves=curves_of(modules, seed))
    plan = asvd(budget)
    assert stored(plan, modules, storage) <= density * numbers(modules) * (1 + 1e-9)

    def grid(module):
        ranks = [storage.rank_for(ratio * module.numbers, module.d_out, module.d_in) for ratio in ASVD_RATIOS]
        return [rank for rank in ranks if rank]

    threshold = max(budget.curves[name][-1 if rank is None else rank] for name, rank in numbers_of(plan).items())
    tighter = 0  # what it would cost to get every module below the largest loss of the plan
    for module in modules:
        assert plan[module.name].number in [None, *grid(module)]
        below = [rank for rank in grid(module) if budget.curves[module.name][rank] < threshold]
        tighter += storage.stored(min(below, default=None), module.d_out, module.d_in)
    assert threshold == 0 or tighter > density * numbers(modules)


def test_asvd_below_its_smallest_ratio_is_refused():
    modules = decoder(layers=1)
    with pytest.raises(UsageError, match=r"asvd keeps 0\.1 of every linear"):
        asvd(Budget(modules, 0.05, PIVOTED, curves=curves_of(modules, 1)))


def measured(modules, density, storage, seed, multiple) -> Budget:
    """A budget that every allocation can work on."""
    layers = modules[-1].layer + 1
    scores = list(np.random.default_rng(seed).uniform(0.5, 1, layers))
    curves = curves_of(modules, seed)
    return Budget(
        modules,
        density,
        storage,
        attention_density=None,
        curves=curves,
        outliers=scores,
        influence=scores,
        rank_multiple=multiple,
    )


@pytest.mark.parametrize("storage", FORMATS, ids=lambda storage: storage.name)
@pytest.mark.parametrize("name", ALLOCATIONS)
@given(modules=DECODERS, density=st.floats(0.35, 1.0), seed=st.integers(0, 9), multiple=st.sampled_from([2, 8, 32]))
def test_ranks_are_multiples_and_the_density_holds(name, storage, modules, density, seed, multiple):
    budget = measured(modules, density, storage, seed, multiple)
    plan = ALLOCATIONS[name].share_out(budget)
    assert list(plan) == [module.name for module in modules]
    assert stored(plan, modules, storage) <= density * numbers(modules) * (1 + 1e-9)
    for module in modules:
        rank = plan[module.name].number
        assert rank is None or 0 < rank < multiple or rank % multiple == 0
        assert storage.stored(rank, module.d_out, module.d_in) <= module.numbers


@pytest.mark.parametrize("name", ["uniform", "atp", "owl", "iprs"])
@given(modules=DECODERS, density=st.floats(0.35, 0.95), multiple=st.sampled_from([4, 8]))
def test_what_rounding_frees_is_handed_on_until_nothing_more_is_affordable(name, modules, density, multiple):
    plan = ALLOCATIONS[name].share_out(measured(modules, density, LOW_RANK, 0, multiple))
    rest = density * numbers(modules) * (1 + 1e-12) - stored(plan, modules, LOW_RANK)
    for module in modules:
        rank = plan[module.name].number
        if rank is not None:
            above = (rank // multiple + 1) * multiple
            fits = above < min(module.d_out, module.d_in)
            cost = LOW_RANK.numbers(above, module.d_out, module.d_in) if fits else module.numbers
            assert min(cost, module.numbers) - LOW_RANK.numbers(rank, module.d_out, module.d_in) > rest


def test_what_rounding_frees_goes_first_to_the_module_that_is_furthest_below_its_share():
    modules = [Module("a", 60, 60, attention=True), Module("b", 36, 36, attention=False)]
    assert uniform(Budget(modules, 0.5, LOW_RANK)) == {"a": Rank(15), "b": Rank(9)}
    # 0.5 (3600 + 1296) = 2448, of which 8 ranks each take 960 + 576: the 912 left do not pay 960 for 8 more of "a",
    # but 576 for 8 more of "b" and then 144 to keep it dense, where 24 ranks would cost 1728
    assert uniform(Budget(modules, 0.5, LOW_RANK, rank_multiple=8)) == {"a": Rank(8), "b": DENSE}
    # at 0.52 there are 1009 left: "a", which lacks 0.49 of its share, comes before "b", which lacks 0.15
    assert uniform(Budget(modules, 0.52, LOW_RANK, rank_multiple=8)) == {"a": Rank(16), "b": Rank(8)}


@pytest.mark.parametrize("floor", [0.1, 0.6])
def test_the_floor_is_a_share_of_the_uniform_rank_and_is_reached(floor):
    modules = decoder(layers=2)
    curves = curves_of(modules, 5)
    plan = by_loss(Budget(modules, 0.5, PIVOTED, curves=curves, rank_floor=floor))
    exact = numbers_of(uniform(Budget(modules, 0.5, PIVOTED)))
    ranks = numbers_of(plan)
    assert all(rank is None or rank >= int(floor * exact[name]) for name, rank in ranks.items())
    assert any(rank == int(floor * exact[name]) for name, rank in ranks.items())


def by_size(budget: Budget) -> Plan:
    """More for larger linears."""
    largest = max(module.numbers for module in budget.modules)
    return plan_of(budget, lambda module: budget.density * (0.5 + module.numbers / largest / 2))


def test_a_new_allocation_is_a_function_and_a_line(monkeypatch, arguments, tmp_path, good):
    monkeypatch.setitem(ALLOCATIONS, "by_size", Allocation(by_size))
    record = good(arguments("m", save_path=tmp_path, prune="svd", density=0.8, allocation="by_size"))
    ranks = {name.rsplit(".", 1)[-1]: rank for name, rank in record["ranks"].items() if "layers.0" in name}
    assert 0.4 < record["density_pivoted"] <= 0.8 and ranks["k_proj"] < ranks["q_proj"] < ranks["up_proj"]


def test_importing_the_allocations_imports_no_torch():
    """But for the package that they are in, which teaches transformers the format."""
    code = (
        "import sys, types; room = types.ModuleType('component'); room.__path__ = ['component'];"
        "sys.modules['component'] = room; import component.ranks.allocation, component.ranks.plan;"
        "print(*{'torch', 'transformers'} & set(sys.modules))"
    )
    folder = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
