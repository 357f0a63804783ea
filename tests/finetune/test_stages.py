"""component/finetune: only the factors change, as asked, and a run that is killed comes to the same bytes."""

import importlib.util
import json
import math
import os
import random
import shutil
import signal
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutput

import PIFA
from component.checkpoint import reading as files
from component.finetune import data, stages
from component.finetune import lora as finetune_lora
from component.finetune.curves import CURVES, PARTS, PLOT
from component.finetune.loop import MOST_SKIPPED, Schedule, Training, rates_of, summed_loss
from component.finetune.state import MERGED, STATE
from component.modes import finetune
from component.modes.parser import Options
from evaluater import perplexity
from tests import children, tiny
from utils import models, plots, sources
from utils.errors import RunError, UsageError
from utils.lock import LOCK
from utils.whole_files import PARTIAL

needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason=f"peft is absent: {finetune_lora.REQUIREMENTS}"
)
KINDS = ["compressed", "pivoted", "folded"]
ORDERS = ["full", pytest.param("joint", marks=needs_peft), pytest.param("sequential", marks=needs_peft)]
QUICK = {"max_steps": 6, "batch_size": 4, "micro_batch_size": 2, "cutoff_len": 32, "learning_rate": 1e-3}
TIMES = (files.RECORD,)


@pytest.fixture(scope="module")
def folded(arguments, compressed, tmp_path_factory) -> Path:
    parent = tmp_path_factory.mktemp("folded")
    return Path(PIFA.run(arguments("pifa", model_path=compressed, save_path=parent, fold=True))["path"])


@pytest.fixture
def options(pivoted, text_file, tmp_path):
    """options(flag=value, ...): parsed flags that fine-tune the pivoted checkpoint on the tiny text."""

    def make(**changes) -> Options:
        common = {
            "model_path": pivoted,
            "save_path": tmp_path / "out",
            "data_path": [str(text_file)],
            "prefix": "",
            "dtype": None,
            "resume": False,
            "seed": 3,
            "DEV": "cpu",
            "order": "full",
            "save_steps": 100,
            "gradient_checkpointing": False,
        }
        return finetune_flags(**{**common, **QUICK, **changes})

    return make


def finetune_flags(**changes) -> Options:
    """All flags of --mode finetune on the CPU, some of them given."""
    return PIFA.parse(tiny.flags("finetune", **{"DEV": "cpu", **changes}))


def factors_in(folder: Path) -> set[str]:
    """Names of the weights that fine-tuning may change."""
    layers = files.read_checkpoint(folder).layers
    kinds = {"lowrank": ("u", "v"), "pifa": ("pivot", "coeff"), "dense": ()}
    return {f"{name}.{part}.weight" for name, entry in layers.items() for part in kinds[entry["kind"]]}


def trainable(folder: Path, order: str, number: int = 0, **changes) -> tuple[stages.Stage, Training]:
    """The stage `number` of an order, at its first step."""
    settings = finetune.settings_of(finetune_flags(seed=3, order=order, data_path=["x"], **changes))
    source = files.read_checkpoint(folder)
    both = stages.stages_of(order, source.layers)
    model = stages.load_trainable(source, torch.device("cpu"), both)
    return both[number], stages.begin(model, both[number], settings, steps=4)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=tiny.token_windows(2, 24), use_cache=False).logits


# ---------------------------------------------------------------- the loop


class Toy(nn.Module):
    """A model of one token: what comes next depends on the token alone. Token 7 makes it say NaN."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(8, 8))

    def forward(self, input_ids, use_cache):
        scores = self.table[input_ids]
        return CausalLMOutput(logits=torch.where(input_ids[..., None] == 7, torch.nan, scores))


def toy(steps: int) -> Training:
    model = Toy()
    return Training(model, {"table": model.table}, schedule(steps, learning_rate=0.1, warmup_ratio=0.0))


def schedule(steps: int, learning_rate: float, warmup_ratio: float) -> Schedule:
    return Schedule(
        steps=steps, learning_rate=learning_rate, warmup_ratio=warmup_ratio, compute_dtype=torch.float32, seed="toy"
    )


GOOD, BAD = (data.Batch(torch.tensor([row]), torch.tensor([row])) for row in ([1, 2, 1, 2], [1, 2, 7, 2]))


def test_a_step_without_a_finite_loss_changes_nothing_and_is_counted():
    training, tables = toy(5), []
    training.run(lambda step: [BAD] if step == 2 else [GOOD], lambda: tables.append(training.model.table.clone()), 1)
    losses = [point["loss"] for point in training.curve]
    assert losses[2] is None and all(later < earlier for earlier, later in pairwise(losses[:2] + losses[3:]))
    assert torch.equal(tables[1], tables[2]) and not torch.equal(tables[2], tables[3])
    assert training.model.table.isfinite().all()
    assert training.optimiser.state[training.model.table]["step"] == 4


def test_a_bad_micro_batch_takes_its_whole_step_along():
    training = toy(1)
    training.run(lambda step: [GOOD, BAD, GOOD], lambda: None, 0)
    assert training.curve[0]["loss"] is None and not training.model.table.any()


def test_many_bad_steps_in_a_row_end_the_run():
    training = toy(100)
    with pytest.raises(RunError, match="not finite"):
        training.run(lambda step: [GOOD] if step in (3, 5) else [BAD], lambda: None, 0)
    assert len(training.curve) == 6 + MOST_SKIPPED


def test_the_rate_rises_to_one_and_falls_to_zero():
    def rates_in(steps: int) -> list[float]:
        """Each as a run that goes on there has it."""
        plan = schedule(steps, learning_rate=1.0, warmup_ratio=0.05)
        optimiser = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "initial_lr": 1.0}], lr=1.0)
        return [rates_of(optimiser, plan, done).get_last_lr()[0] for done in range(steps)]

    rates = rates_in(100)
    assert rates[:6] == pytest.approx([number / 6 for number in range(1, 7)], rel=1e-12)
    assert rates[5:] == pytest.approx([number / 95 for number in range(95, 0, -1)], rel=1e-12)
    assert rates.index(max(rates)) == 5 and max(rates) == 1
    assert all(b > a for a, b in pairwise(rates[:6])) and all(b < a for a, b in pairwise(rates[5:]))
    assert 0 < rates[0] < 0.2 and 0 < rates[-1] < 0.02
    assert rates_in(1) == [1]


def test_the_loss_is_the_librarys(model_folder, instructions):
    model = models.load_model(sources.find_source(str(model_folder)), torch.float32)
    tokens, labels = data.collate(data.read_rows(str(instructions), tiny.tokenizer(), 200))
    scores = model(input_ids=tokens).logits
    mean = summed_loss(scores, labels) / (labels[:, 1:] != data.IGNORED).sum()
    assert mean.item() == pytest.approx(model(input_ids=tokens, labels=labels).loss.item(), rel=1e-6)


def test_micro_batches_are_one_batch(pivoted, instructions):
    rows = data.read_rows(str(instructions), tiny.tokenizer(), 200)  # of different lengths
    curves = []
    for parts in ([rows], [rows[:1], rows[1:]], [[row] for row in rows]):
        _, training = trainable(pivoted, "full")
        batches = [data.collate(part) for part in parts]
        training.run(lambda step, batches=batches: batches, lambda: None, 0)
        curves.append([(point["loss"], point["norm"]) for point in training.curve])
    for curve in curves[1:]:
        assert torch.tensor(curve).allclose(torch.tensor(curves[0]), rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_same_in_bfloat16_products_to_their_precision(kind, request):
    folder = request.getfixturevalue(kind)
    gradients = []
    for dtype in ("float32", "bfloat16"):
        _, training = trainable(folder, "full", compute_dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            scores = training.model(input_ids=tiny.token_windows(2, 24), use_cache=False).logits
        summed_loss(scores, tiny.token_windows(2, 24)).backward()
        assert all(parameter.dtype == torch.float32 for parameter in training.parameters.values())
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in training.parameters.values()]))
    assert gradients[0].norm() > 0
    assert tiny.relative(gradients[1], gradients[0]) < 0.05


# ---------------------------------------------------------------- adapters


@needs_peft
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order, number", [("sequential", 0), ("sequential", 1), ("joint", 0)])
def test_the_merged_model_is_the_adapted_one(kind, order, number, request):
    stage, training = trainable(request.getfixturevalue(kind), order, number)
    plain = logits(training.model)
    model = training.model.double()
    with torch.no_grad():
        for seed, parameter in enumerate(training.parameters.values()):
            parameter.copy_(0.05 * tiny.rand(*parameter.shape, seed=seed))
    adapted = logits(model)
    merged = finetune_lora.merge(model)
    assert tiny.relative(adapted, plain.double()) > 1e-3
    assert tiny.relative(logits(merged), adapted) < 1e-12
    assert all(type(merged.get_submodule(name)) is nn.Linear for name in stage.linears)


@needs_peft
@pytest.mark.parametrize("kind, words", [("compressed", ("u", "v")), ("pivoted", ("coeff", "pivot"))])
def test_stages_train_one_factor_and_then_the_other(kind, words, request):
    folder = request.getfixturevalue(kind)
    for number, word in enumerate(words):
        stage, training = trainable(folder, "sequential", number)
        assert {name.rsplit(".", 1)[1] for name in stage.linears} == {word}
        owners = {name.split(".lora_")[0].removeprefix("base_model.model.") for name in training.parameters}
        assert owners == set(stage.linears)
    both, _ = trainable(folder, "joint")
    assert {f"{name}.weight" for name in both.linears} == factors_in(folder)


def test_without_peft_the_line_says_how_to_get_it(options, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for order in ("sequential", "joint"):
        with pytest.raises(UsageError, match=f"pip install -r {finetune_lora.REQUIREMENTS}.*--order full"):
            finetune.run(options(order=order))
    assert (Path(PIFA.__file__).parent / finetune_lora.REQUIREMENTS).is_file()


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", KINDS)
def test_only_factors_change_and_the_result_loads_as_the_source_does(kind, order, options, request):
    source = request.getfixturevalue(kind)
    record = finetune.run(options(order=order, model_path=source))
    folder = Path(record["path"])
    assert folder.name.startswith(f"{source.name}-ft-") and len(folder.name) == len(source.name) + 12
    before, after = tiny.stored_tensors(source), tiny.stored_tensors(folder)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == factors_in(source)
    assert json.loads((folder / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    expected = tiny.contents(source, (files.RECORD, files.MANIFEST)).keys() | {CURVES}
    names = {path.name for path in folder.iterdir()} - {files.RECORD, files.MANIFEST, PLOT}
    assert names == expected

    stored = json.loads((source / files.RECORD).read_text())
    for name in ("density", "density_pivoted", "density_model", "density_asked", "ranks", "model", "kind", "dtype"):
        assert record[name] == stored[name]
    assert record["mode"] == "finetune" and record["source"] == str(source) and record["seconds"] > 0
    assert record == files.read_checkpoint(folder).record
    files.read_checkpoint(folder).verify()
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert tiny.relative(logits(model), logits(AutoModelForCausalLM.from_pretrained(source))) > 1e-4


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("order", ORDERS)
def test_the_loss_goes_down_on_text_that_was_not_seen(order, compute, options, tmp_path, pivoted):
    text = tiny.text(3000)
    (tmp_path / "train.txt").write_text(text[:-2000])
    unseen = torch.tensor(tiny.tokenizer()(text[-2000:])["input_ids"])[:1600].reshape(-1, 32)
    rate = {"full": 3e-3}.get(order, 1e-2)
    given = {"order": order, "compute_dtype": compute, "data_path": [str(tmp_path / "train.txt")]}
    record = finetune.run(options(**given, max_steps=40, learning_rate=rate, batch_size=8, micro_batch_size=8))
    for losses in record["losses"].values():
        assert losses[-1][1] < losses[0][1]
    before, after = (
        perplexity(AutoModelForCausalLM.from_pretrained(folder).eval(), unseen, 8).ppl
        for folder in (pivoted, record["path"])
    )
    assert after < 0.8 * before
    assert sum(record["finetune"]["skipped_steps"].values()) == 0


def test_the_curve_is_kept_for_every_step_and_drawn_in_parts(options, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "can_plot", lambda: True)
    monkeypatch.setattr(plots, "draw_panels", lambda path, panels: drawn.append((path.name, panels)))
    record = finetune.run(options(max_steps=45))
    curves = json.loads((Path(record["path"]) / CURVES).read_text())
    assert [point["step"] for point in curves["factors"]] == list(range(1, 46))
    parts = record["losses"]["factors"]
    assert len(parts) <= PARTS and parts[-1][0] == 45
    assert parts[0][1] == pytest.approx(sum(point["loss"] for point in curves["factors"][:3]) / 3)
    ((name, (panel,)),) = drawn
    assert name == PLOT and list(map(list, *panel.lines.values())) == parts


def test_epochs_count_the_rows(options, instructions):
    record = finetune.run(options(max_steps=None, num_epochs=3, data_path=[str(instructions)], cutoff_len=200))
    assert record["finetune"]["steps"] == math.ceil(3 * 5 / 4)
    (used,) = record["finetune"]["data"]
    assert used["rows"] == 5 and used["passes"] == 16 / 5


def test_recomputing_activations_changes_no_number(options, tmp_path):
    plain = finetune.run(options())
    saving = finetune.run(options(gradient_checkpointing=True, save_path=tmp_path / "saving"))
    assert tiny.contents(Path(plain["path"]), TIMES) == tiny.contents(Path(saving["path"]), TIMES)


def test_another_dtype_is_written_and_the_rest_is_as_pivoting_writes_it(options, arguments, compressed, tmp_path):
    record = finetune.run(options(dtype="bfloat16", model_path=compressed))
    assert {t.dtype for t in tiny.stored_tensors(Path(record["path"])).values()} == {torch.bfloat16}
    again = PIFA.run(arguments("pifa", model_path=record["path"], save_path=tmp_path / "again"))
    assert again["kind"] == "pifa" and again["finetune"] == record["finetune"]
    assert logits(AutoModelForCausalLM.from_pretrained(again["path"])).isfinite().all()


def test_a_factor_that_the_written_dtype_cannot_hold_ends_the_run(options, compressed, tmp_path):
    with pytest.raises(RunError, match=r"not finite in torch\.float16"):
        finetune.run(options(dtype="float16", learning_rate=1e6, warmup_ratio=0, max_steps=1))


# ---------------------------------------------------------------- flags


def test_what_cannot_be_is_refused_before_any_work(options, tmp_path):
    wrong = [
        ({"order": "random"}, "--order"),
        ({"order": "joint", "data_path": None}, "--data_path"),
        ({"learning_rate": 0.0}, "--learning_rate"),
        ({"micro_batch_size": 5}, "--micro_batch_size"),
        ({"cutoff_len": 1}, "--cutoff_len"),
        ({"cutoff_len": 10**6}, "--cutoff_len"),
        ({"warmup_ratio": 1.0}, "--warmup_ratio"),
        ({"max_steps": None, "num_epochs": float("nan")}, "--num_epochs"),
        ({"compute_dtype": "float16"}, "--compute_dtype"),
        ({"model_path": "original"}, "factors"),
        ({"model_path": tmp_path / "none"}, "no such checkpoint"),
        ({"data_path": ["nowhere.txt"]}, "nowhere.txt"),
    ]
    for changes, word in wrong:
        with pytest.raises(UsageError, match=word):
            finetune.run(options(**changes))
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_factors_has_nothing_to_train():
    dense = {"q": {"kind": "dense", "rank": 4, "in_features": 4, "out_features": 4}}
    with pytest.raises(UsageError, match="dense"):
        stages.stages_of("full", dense)


def test_coefficients_of_no_rows_are_left_out():
    square = {"q": {"kind": "pifa", "rank": 4, "in_features": 8, "out_features": 4}}
    assert stages.stages_of("joint", square) == [("factors", ["q.pivot"])]
    assert stages.stages_of("sequential", square) == [("pivots", ["q.pivot"])]


def test_the_papers_recipes_are_the_defaults():
    full = finetune.settings_of(finetune_flags(order="full", seed=3))
    assert (full.learning_rate, full.max_steps, full.cutoff_len) == (3e-6, 1000, 1024)
    assert (full.batch_size, full.micro_batch_size, full.warmup_ratio) == (128, 1, 0.05)
    assert full.data_path == ["wikitext2:0.02", "c4:0.98"]
    lora = finetune.settings_of(finetune_flags(seed=3, data_path=["pydoc"]))
    assert (lora.order, lora.lora_r, lora.lora_alpha, lora.num_epochs) == ("sequential", 8, 16, 2)
    assert (lora.learning_rate, lora.batch_size, lora.max_steps) == (1e-4, 64, None)


def test_nothing_is_overwritten_and_the_newest_source_is_found(options, pivoted, tmp_path):
    shutil.copytree(pivoted, tmp_path / "out" / pivoted.name)
    record = finetune.run(options(model_path=None))
    assert record["source"] == str(tmp_path / "out" / pivoted.name)
    with pytest.raises(UsageError, match="--resume"):
        finetune.run(options(model_path=None))  # of the same source, although the result is newer
    assert finetune.run(options(model_path=None, resume=True)) == record
    twice = finetune.run(options(model_path=record["path"]))
    assert twice["source"] == record["path"]


# ---------------------------------------------------------------- kills


@pytest.mark.parametrize(
    "order, stop",
    [
        *(("full", stop) for stop in (1, 2, 5)),
        pytest.param("joint", 3, marks=needs_peft),
        *(pytest.param("sequential", stop, marks=needs_peft) for stop in (3, 6, 7, 10)),
    ],
)
def test_an_interrupted_run_goes_on_with_the_same_losses_and_bytes(order, stop, options, tmp_path, monkeypatch):
    """stop: steps done before the interruption; from 6 on they are in the second stage."""
    whole = finetune.run(options(order=order, save_path=tmp_path / "whole"))
    steps = QUICK["max_steps"] * len(whole["losses"])
    advance, allowed, done = Training._advance, stop, []

    def counted(*arguments) -> None:
        if len(done) == allowed:
            raise RunError("stopped")
        done.append(1)
        advance(*arguments)

    monkeypatch.setattr(Training, "_advance", counted)
    given = {"order": order, "save_steps": 2}
    with pytest.raises(RunError, match="stopped"):
        finetune.run(options(**given))
    allowed, done = steps, []
    record = finetune.run(options(**given, resume=True))
    assert len(done) == steps - stop + stop % 2  # a state every second step
    assert record["losses"] == whole["losses"]
    assert tiny.contents(Path(record["path"]), TIMES) == tiny.contents(Path(whole["path"]), TIMES)


@needs_peft
def test_runs_killed_again_and_again_come_to_the_same_bytes(options, tmp_path):
    given = options(order="sequential", save_steps=2, max_steps=4, resume=True)
    counted = tmp_path / "count"
    assert finish(given, count_into=counted) == 0
    (folder,) = (tmp_path / "out").iterdir()
    expected = tiny.contents(folder, TIMES)
    assert not {STATE, MERGED, f".{STATE}{PARTIAL}"} & {path.name for path in folder.iterdir()}
    shutil.rmtree(folder)
    operations = int(counted.read_text())
    draw, killed = random.Random("kills"), 0
    while killed < 8:
        code = finish(given, kill_at=draw.randint(1, operations))
        assert code in (0, -signal.SIGKILL)
        killed += code != 0
        if code == 0:
            assert tiny.contents(folder, (*TIMES, LOCK)) == expected  # whoever was killed last held it
            shutil.rmtree(folder)
    assert finish(given) == 0
    assert tiny.contents(folder, TIMES) == expected


def finish(options: Options, **more) -> int:
    """Run in a process of its own; the exit code, negative for a signal."""
    child = children.SERVER.Process(target=run_counted, args=(options,), kwargs=more)
    child.start()
    child.join(120)
    assert child.exitcode is not None
    return child.exitcode


def run_counted(options: Options, kill_at: int | None = None, count_into: Path | None = None) -> None:
    """kill_at: number of the file operation under --save_path before which SIGKILL comes."""
    seen = 0

    def audit(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event in children.OPERATIONS and str(arguments[0]).startswith(str(options.save_path)):
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)
    torch.set_num_threads(1)
    finetune.run(options)
    if count_into is not None:
        count_into.write_text(str(seen))
