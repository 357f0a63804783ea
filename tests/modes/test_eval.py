"""component/modes/eval.py: a reloaded checkpoint answers the tasks of the harness as the model in memory does."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

import PIFA
from component.modes.eval import REQUIREMENTS
from evaluater import zero_shot
from tests import tiny

TASKS = Path(__file__).parents[1] / "tasks"
needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason=f"the lm-evaluation-harness is absent: {REQUIREMENTS}"
)


@pytest.fixture
def task_path(tmp_path) -> Path:
    """The task, which has to name its data by a path that holds from anywhere."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name in ("letters.yaml", "letters.jsonl"):
        (folder / name).write_text((TASKS / name).read_text().replace("{FOLDER}", str(folder)))
    return folder


@pytest.fixture
def own_tasks_only(monkeypatch):
    """The harness without the index of its own thousands of tasks, which takes 20 seconds at every call."""
    from lm_eval import tasks

    class OwnTasks(tasks.TaskManager):
        def __init__(self, include_path: str) -> None:
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(tasks, "TaskManager", OwnTasks)


@needs_harness
@pytest.mark.usefixtures("own_tasks_only")
def test_a_reloaded_checkpoint_is_as_accurate_as_the_model_in_memory(arguments, task_path, tmp_path, good, computed):
    """Through both modes; the model in memory is the original with the driver's own layers put in."""
    from lm_eval.tasks import TaskManager

    good(arguments("m", density=0.6, save_path=tmp_path))
    model = tiny.build()
    for index, layer in computed.items():
        model.model.layers[index] = layer
    judge = {"tasks": "letters", "task_path": task_path, "save_path": tmp_path}
    manager = TaskManager(include_path=str(task_path))
    in_memory = zero_shot(model, tiny.tokenizer(), ["letters"], manager=manager)
    record = good(arguments("eval", **judge))
    assert record["tasks"] == in_memory and set(record["tasks"]["letters"]) >= {"acc", "acc_norm", "acc_stderr"}
    good(arguments("pifa", save_path=tmp_path))
    pivoted = good(arguments("eval", **judge))
    assert pivoted["path"].endswith("-pifa") and pivoted["tasks"]["letters"]["acc"] == in_memory["letters"]["acc"]


@needs_harness
@pytest.mark.usefixtures("own_tasks_only")
def test_accuracy_is_that_of_the_likeliest_choice_by_hand(arguments, task_path, good):
    record = good(arguments("eval", tasks="letters", task_path=task_path, model_path="original", task_limit=6))
    model, tokenizer = tiny.build(), tiny.tokenizer()
    right = 0
    lines = (task_path / "letters.jsonl").read_text().splitlines()[:6]
    for line in lines:
        document = json.loads(line)
        scores = []
        for choice in document["choices"]:
            before = tokenizer(document["text"])["input_ids"]
            after = tokenizer(f" {choice}")["input_ids"]
            with torch.no_grad():
                table = model(torch.tensor([before + after])).logits[0].double().log_softmax(-1)
            places = range(len(before) - 1, len(before) + len(after) - 1)
            scores.append(sum(table[place, token].item() for place, token in zip(places, after, strict=True)))
        right += scores.index(max(scores)) == document["answer"]
    assert math.isclose(record["tasks"]["letters"]["acc"], right / 6)
    assert (record["mode"], record["task_limit"], record["num_fewshot"]) == ("eval", 6, None)


@needs_harness
def test_an_unknown_task_is_refused_before_the_model_is_loaded(arguments, task_path, bad):
    bad(
        arguments("eval", tasks=["letters", "numbers"], task_path=task_path, model_path="original"),
        "unknown task numbers",
    )
    bad(arguments("eval", tasks="letters", task_path=task_path / "absent"), "no such folder of tasks")


def test_without_the_harness_it_says_what_installs_it(arguments, bad, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "lm_eval" else found(name, *more)
    )
    bad(arguments("eval", tasks="piqa"), "pip install -r requirements-eval.txt")
    assert (Path(PIFA.__file__).parent / REQUIREMENTS).is_file()


def test_tasks_are_needed(arguments, bad):
    bad(arguments("eval"), "--mode eval needs --tasks")
    bad(arguments("eval", tasks="piqa", num_fewshot=-1), "--num_fewshot -1 is below 0")
    bad(arguments("eval", tasks="piqa", task_limit=0), "--task_limit 0 is below 1")
