"""component/bench*.py: every row computes what it says, a wrong one is found, and nothing is overwritten."""

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from component.bench import model as bench_model
from component.bench import sections as bench_sections
from component.bench import timing
from component.bench.block import KINDS, STACKED_DENSE, MLPShape, block_makers
from component.bench.layer import (
    DENSE,
    LOW_RANK_SAME_RANK,
    PIVOT_ORDER,
    PUBLISHED,
    TWO_FOUR,
    Shape,
    aligned,
    draw_pivoted,
    layer_makers,
    plain_pifa,
    published_pifa,
)
from component.bench.model import random_model
from component.bench.rows import Case, Row, compare, compare_training, output_error
from component.bench.timing import Limits
from component.format.linear import LowRankLinear, PIFALinear, PivotOrderLinear
from component.modes import bench
from component.ranks.cost import LOW_RANK, PIVOTED
from tests import tiny
from tests.tiny import rand, relative
from utils import plots
from utils.errors import RunError, UsageError

CPU = torch.device("cpu")
LIMITS = Limits(1.0, 100.0)
SHAPE = Shape.at_density(96, 64, 0.55)
LAYER_ROWS = [make for make in layer_makers(SHAPE, torch.float64, CPU) if not make().refused]
BLOCK = MLPShape.at_density(64, 96, 0.55)
BLOCK_ROWS = [make for make in block_makers(BLOCK, torch.float64, CPU) if not make().refused]


def case(tokens: int = 3, dtype: torch.dtype = torch.float32, shape: Shape = SHAPE) -> Case:
    return Case(shape.labels, shape.d_out, shape.d_in, tokens, dtype, CPU)


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("make", LAYER_ROWS + BLOCK_ROWS, ids=lambda make: make().name)
def test_every_row_is_its_oracle(make):
    row = make()
    x = rand(5, 64)
    assert relative(row.forward(x), row.expected(x)) < 1e-12
    assert row.flops > 0 and row.stored_bytes > 0
    assert relative(make().forward(x), row.forward(x)) > 0.1  # another has other weights


def test_the_rows_are_there():
    names = [make().name for make in layer_makers(SHAPE, torch.float32, CPU)]
    assert names == [
        "dense", "low-rank, same rank", "low-rank, same density", "PIFA, two index copies",
        "PIFA here, pivot order", "PIFA here", "2:4 cuSPARSELt", "2:4 CUTLASS",
    ]  # fmt: skip
    stacked = [f"{kind}, stacked" for kind in KINDS]
    assert [make().name for make in block_makers(BLOCK, torch.float32, CPU)] == [
        *KINDS[:2], PUBLISHED, *KINDS[2:], *stacked, TWO_FOUR,
    ]  # fmt: skip


@pytest.mark.parametrize(("d_out", "d_in"), [(96, 64), (512, 512), (4096, 11008), (11008, 4096), (32768, 32768)])
@pytest.mark.parametrize("density", [0.2, 0.55, 0.9])
def test_shapes_never_exceed_their_density(d_out, d_in, density):
    shape = Shape.at_density(d_out, d_in, density)
    assert PIVOTED.numbers(shape.rank, d_out, d_in) <= density * d_out * d_in
    assert LOW_RANK.numbers(shape.low_rank, d_out, d_in) <= PIVOTED.numbers(shape.rank, d_out, d_in)
    assert shape.rank < 32 or shape.rank % 16 == 0
    lost = max(16, shape.rank // 99 + 1) if shape.rank % 64 == 0 else 16  # a hundredth, to a multiple of 64
    assert PIVOTED.numbers(shape.rank + lost, d_out, d_in) > density * d_out * d_in


def test_ranks_are_rounded_to_64_where_that_costs_a_hundredth_at_most():
    assert [aligned(rank) for rank in (5392, 6463, 1347, 1120, 40, 31)] == [5376, 6400, 1344, 1120, 32, 31]


def test_a_density_without_a_rank_is_refused():
    for density in (0.01, 1.0):
        with pytest.raises(UsageError, match="96 x 64"):
            Shape.at_density(96, 64, density)


def test_flops_are_two_for_each_number_and_token():
    rows = {make().name: make() for make in layer_makers(SHAPE, torch.float32, CPU)}
    m, n, r = SHAPE
    assert rows[DENSE].flops == 2 * m * n
    assert rows["low-rank, same rank"].flops == 2 * r * (m + n)
    assert rows[PUBLISHED].flops == rows[PIVOT_ORDER].flops == 2 * r * (m + n - r)


def test_published_pifa_has_the_gradients_of_the_plain_one():
    layer = draw_pivoted(Shape(9, 7, 4), torch.float64, CPU)

    def gradients(forward):
        wanted = [rand(3, 7, seed=1), layer.pivot.clone(), layer.coeff.clone()]
        x, pivot, coeff = (t.requires_grad_() for t in wanted)
        forward(x, layer._replace(pivot=pivot, coeff=coeff)).backward(rand(3, 9, seed=2))
        return [t.grad for t in wanted]

    for found, expected in zip(gradients(published_pifa), gradients(plain_pifa), strict=True):
        torch.testing.assert_close(found, expected)


# ---------------------------------------------------------------- comparing


def broken(change) -> Row:
    weight = rand(96, 64).float()
    return Row("broken", (weight,), lambda x: change(x @ weight.T), lambda x: x @ weight.double().T, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: y.roll(1, dims=-1), "broken: relative error"),
        (lambda y: y.index_fill(0, torch.tensor([len(y) - 1]), 0.0), "broken: relative error"),
        (lambda y: y.index_fill(1, torch.tensor([5]), torch.nan), "broken: .* not finite"),
        (lambda y: torch.cat([y[:70], y[70:71] * torch.inf, y[71:]]), "not finite"),  # between the tokens compared
    ],
)
def test_a_wrong_output_is_found(change, message):
    x = rand(200, 64).float()
    assert output_error(broken(lambda y: y), x, 96) < 1e-6
    with pytest.raises(RunError, match=message):
        output_error(broken(change), x, 96)


@pytest.mark.parametrize("change", [lambda y: 2 * y, lambda y: y @ y])
def test_a_foreign_row_that_is_wrong_or_fails_hides_no_other(change):
    rows = [broken(lambda y: y), replace(broken(change), name="foreign", foreign=True)]
    first, second = compare(case(70), [lambda row=row: row for row in rows], LIMITS, seconds=0)
    assert first["speedup"] == 1 and second["refused"].startswith("failed: ") and "speedup" not in second
    with pytest.raises((RunError, RuntimeError)):
        compare(case(70), [lambda row=row: replace(row, foreign=False) for row in rows], LIMITS, seconds=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 70])
def test_results_follow_from_the_seconds(dtype, tokens):
    results = compare(case(tokens, dtype), layer_makers(SHAPE, dtype, CPU), LIMITS, seconds=0)
    by_name = {result["row"]: result for result in results}
    assert by_name[TWO_FOUR]["refused"] == "not supported here: no GPU" and "seconds" not in by_name[TWO_FOUR]
    dense = by_name[DENSE]
    assert dense["speedup"] == dense["memory"] == 1
    size = torch.empty(0, dtype=dtype).element_size()
    for result in by_name.values():
        assert (result["d_out"], result["d_in"], result["rank"], result["tokens"]) == (*SHAPE, tokens)
        if "refused" in result:
            continue
        assert result["speedup"] == pytest.approx(dense["seconds"] / result["seconds"])
        moved = result["weight_bytes"] + size * tokens * (96 + 64)
        assert result["gbs"] * 1e9 == pytest.approx(moved / result["seconds"])
        floor = LIMITS.floor(result["tflops"] * 1e12 * result["seconds"], moved)
        assert result["of_limit"] == pytest.approx(floor / result["seconds"])
    assert dense["tflops"] * 1e12 == pytest.approx(2 * 96 * 64 * tokens / dense["seconds"])
    assert dense["weight_bytes"] == 96 * 64 * size


@pytest.mark.parametrize(("tokens", "copies"), [(1, 4), (64, 4), (65, 1)])
def test_few_tokens_are_timed_over_layers_of_their_own(tokens, copies, monkeypatch):
    """A result is the time of one of them."""
    called = []

    def medians(calls, _device, _seconds):
        called.clear()
        for call in calls.values():
            call()
        return dict.fromkeys(calls, 8.0)

    def make():
        weight = torch.randn(96, 64)
        forward = lambda x: called.append(weight.data_ptr()) or x @ weight.T  # noqa: E731
        return Row("dense", (weight,), forward, lambda x: x @ weight.double().T, 2 * 96 * 64)

    monkeypatch.setattr(timing, "interleaved_medians", medians)
    monkeypatch.setattr(timing, "copies_beyond_cache", lambda size, _device: 4 if size == 96 * 64 * 4 else 0)
    monkeypatch.setattr(timing, "peak_bytes", lambda _call, _device: None)
    (result,) = compare(case(tokens), [make], LIMITS, seconds=0)
    assert result["seconds"] == 8.0 / copies and result["speedup"] == 1
    assert len(called) == len(set(called)) == copies


def test_training_rows_are_those_with_gradients():
    results = compare_training(case(), layer_makers(SHAPE, torch.float32, CPU), seconds=0)
    assert [r["row"] for r in results] == [make().name for make in LAYER_ROWS]
    assert results[0]["speedup"] == 1


# ---------------------------------------------------------------- models of random weights


@pytest.mark.parametrize("kind", KINDS)
def test_random_models_have_the_kind_and_density_asked(kind):
    config = tiny.build("qwen2").config
    model = random_model(config, kind, 0.55, dtype=torch.float32, device=CPU)
    expected = {KINDS[0]: nn.Linear, KINDS[1]: LowRankLinear}.get(kind, PIFALinear)
    named = [(name, module) for name, module in model.named_modules() if name.startswith("model.layers")]
    linears: dict = {name: module for name, module in named if name.endswith("_proj")}
    assert len(linears) == 14 and all(isinstance(module, expected) for module in linears.values())
    stored = sum(p.numel() for module in linears.values() for n, p in module.named_parameters() if n != "bias")
    dense = sum(module.in_features * module.out_features for module in linears.values())
    assert stored == dense if kind == "dense" else 0.4 * dense < stored <= 0.55 * dense
    assert linears["model.layers.0.self_attn.q_proj"].bias is not None
    assert torch.isfinite(model(tiny.token_windows(1, 5)).logits).all()
    if expected is PIFALinear:
        identity = torch.arange(96, dtype=torch.int32)
        in_order = {name for name, m in linears.items() if torch.equal(m.perm, identity[: m.out_features])}
        assert in_order == {name for name, m in linears.items() if isinstance(m, PivotOrderLinear)}
        folded = {f"model.layers.{i}.mlp.{n}_proj" for i in (0, 1) for n in ("gate", "up")}
        assert in_order == (folded if kind == KINDS[3] else set())


# ---------------------------------------------------------------- the mode


def options(save_path: Path, **changes) -> Namespace:
    given = {
        "DEV": "cpu", "save_path": str(save_path), "prefix": "", "model": None, "model_path": None, "dtype": "float32",
        "density": 0.55, "seed": 3, "command": "the command", "bench_what": "layer", "bench_dims": [96, 64],
        "bench_tokens": [1, 65], "bench_seconds": 1e-9,
    }  # fmt: skip
    return Namespace(**{**given, **changes})


@pytest.fixture
def quick(monkeypatch):
    """Nothing large, nothing often."""
    monkeypatch.setattr(timing, "MATMUL_SIZES", {"cpu": (16,)})
    monkeypatch.setattr(timing, "COPY_BYTES", {"cpu": 1024})
    monkeypatch.setattr(timing, "LEAST_ROUNDS", 1)
    monkeypatch.setattr(bench_sections, "LOADS", {"cpu": bench_model.Load((2, 8), 4, (1, 4), 1)})
    monkeypatch.setattr(bench_model, "ROUNDS", 1)


def test_layer_tables_and_the_record(quick, tmp_path, capsys, monkeypatch, caplog):
    monkeypatch.setattr(plots, "can_plot", lambda: False)
    threads = torch.get_num_threads()
    record = bench.run(options(tmp_path))
    folder = Path(record["path"])
    assert folder.parent == tmp_path and {p.name for p in folder.iterdir()} == {"bench.json", "tables.md"}
    assert json.loads((folder / "bench.json").read_text()) == json.loads(json.dumps(record))
    tables = (folder / "tables.md").read_text()
    assert tables.strip() == capsys.readouterr().out.strip()
    for row in ("dense", "PIFA, two index copies", "PIFA here, pivot order"):
        assert f"| 65 | {row} |" in tables
    assert "| not supported here: no GPU |" in tables
    assert {(r["d_out"], r["tokens"]) for r in record["layer"]} == {(96, 1), (96, 65), (64, 1), (64, 65)}
    assert {r["rank"] / r["d_in"] for r in record["ranks"]} == {0.125, 0.25, 0.375, 0.5, 0.625, 0.75}
    assert {r["tokens"] for r in record["ranks"]} == {65}
    half = {r["row"]: r for r in record["ranks"] if r["rank"] == 48}
    low_rank, pivoted = half[LOW_RANK_SAME_RANK], half[PIVOT_ORDER]
    assert pivoted["memory_saved"] == pytest.approx(0.25) and "time_saved" not in low_rank
    assert pivoted["time_saved"] == pytest.approx(1 - pivoted["seconds"] / low_rank["seconds"])
    assert {(r["d_out"], r["tokens"]) for r in record["training"]} == {(96, 256)}
    speedups = {(r["row"], r["d_out"]): r.get("speedup", "-") for r in record["layer"] if r["tokens"] == 65}
    assert {(r["row"], d): r[f"{d} x {d}"] for r in record["layers"] for d in (96, 64)} == speedups
    (limits,) = record["limits"]
    assert limits["dtype"] == "float32" and limits["threads"] == 1 and limits["matmul_tflops"] > 0
    assert [r["row"] for r in record["training"]] == [make().name for make in LAYER_ROWS]
    assert record["mode"] == "bench" and record["dataset"] is None and record["density_asked"] == 0.55
    assert "pip install -r requirements-plots.txt" in caplog.text and record["plots"] == []
    assert torch.get_num_threads() == threads


def test_the_block_is_also_held_against_the_stacked_dense_one(quick, tmp_path):
    record = bench.run(options(tmp_path, bench_what="block"))
    for tokens in (1, 65):
        by_name = {r["row"]: r for r in record["block"] if r["tokens"] == tokens}
        for result in by_name.values():
            if "refused" not in result:
                assert result["over_stacked"] == pytest.approx(by_name[STACKED_DENSE]["seconds"] / result["seconds"])


def test_an_existing_target_is_refused_before_any_work(quick, tmp_path, capsys):
    path = Path(bench.run(options(tmp_path, bench_what="block"))["path"])
    before = tiny.contents(path)
    capsys.readouterr()
    with pytest.raises(UsageError, match="nothing is ever overwritten"):
        bench.run(options(tmp_path, bench_what="block"))
    assert capsys.readouterr().out == "" and tiny.contents(path) == before
    assert Path(bench.run(options(tmp_path, bench_what="block", prefix="b-"))["path"]) != path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bench_what": "decoder"}, "unknown --bench_what decoder: use one of layer, block, model, all"),
        ({"bench_dims": [64, 0]}, "take numbers from 1 on"),
        ({"bench_tokens": [-1]}, "take numbers from 1 on"),
        ({"density": 0.001}, "cannot have density 0.001"),
        ({"model": "/nowhere/at/all"}, "no such model folder"),
        ({"model_path": "/nowhere/at/all"}, "no such model folder"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_work(changes, message, tmp_path, capsys):
    with pytest.raises(UsageError, match=message):
        bench.run(options(tmp_path, **changes))
    assert capsys.readouterr().out == "" and list(tmp_path.iterdir()) == []


def test_on_the_cpu_both_dtypes_are_measured(quick, tmp_path):
    record = bench.run(options(tmp_path, dtype=None, bench_dims=[64]))
    assert [limits["dtype"] for limits in record["limits"]] == ["float32", "bfloat16"]
    assert {r["dtype"] for r in record["layer"]} == {"float32", "bfloat16"}


def test_shapes_are_those_of_a_named_model(quick, tmp_path, model_folder):
    record = bench.run(options(tmp_path, model=str(model_folder), bench_dims=None))
    assert {(r["d_out"], r["d_in"]) for r in record["layer"]} == {(64, 64), (32, 64), (96, 64), (64, 96)}


RUNNERS = ("transformers", "lean runner")


def measured(record) -> list[tuple[str, str]]:
    for result in record["models"]:
        assert result["prefill_tokens_s"] > 0 and result["decode_ms_1"] > 0 and result["first_token_ms_4"] > 0
        assert result["tokens_s_4"] == pytest.approx(4e3 / result["decode_ms_4"])
        assert result["peak_gib"] is None and result["weights_gib"] > 0
    return [(result["row"], result["runner"]) for result in record["models"]]


def test_every_kind_of_random_model_is_measured(quick, tmp_path, model_folder):
    record = bench.run(options(tmp_path, model=str(model_folder), bench_what="model"))
    assert measured(record) == [(kind, runner) for kind in KINDS for runner in RUNNERS]


def test_a_checkpoint_is_measured_beside_the_dense_model_of_its_shapes(quick, tmp_path, pivoted):
    record = bench.run(options(tmp_path, model_path=str(pivoted), bench_what="model"))
    assert measured(record) == [(name, runner) for name in ("dense", pivoted.name) for runner in RUNNERS]
    dense, ours = record["models"][0], record["models"][2]
    stored = sum(t.numel() * t.element_size() for t in tiny.stored_tensors(pivoted).values())
    assert ours["weights_gib"] * 2**30 == stored < dense["weights_gib"] * 2**30
    density = json.loads((pivoted / "pifa.json").read_text())["density"]
    assert f"### {pivoted.name}, density {density:.4g}: " in (Path(record["path"]) / "tables.md").read_text()


def test_a_dense_model_is_measured_beside_pivoted_ones(quick, tmp_path, model_folder):
    record = bench.run(options(tmp_path, model=str(model_folder), model_path="original", bench_what="model"))
    assert [name for name, _ in measured(record)[::2]] == [model_folder.name, *KINDS[2:]]


def test_a_model_that_the_lean_runner_cannot_run_is_measured_by_transformers(quick, tmp_path):
    folder = tiny.save_model(tmp_path / "opt", tiny.build("opt"))
    record = bench.run(options(tmp_path, model=str(folder), bench_what="model"))
    results = record["models"][:2]
    assert results[0]["decode_ms_1"] > 0 and "refused" not in results[0]
    assert "not built like a LLaMA" in results[1]["refused"] and "decode_ms_1" not in results[1]


def test_plots_are_drawn_where_matplotlib_is(quick, tmp_path):
    pytest.importorskip("matplotlib")
    record = bench.run(options(tmp_path, bench_dims=[64, 96]))
    assert record["plots"] == ["dimensions.png", "ranks.png"]
    for name in record["plots"]:
        assert (Path(record["path"]) / name).read_bytes().startswith(b"\x89PNG")
