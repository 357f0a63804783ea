"""--mode eval: zero-shot tasks of the lm-evaluation-harness."""

from dataclasses import replace
from typing import Any

from component.modes import shared
from component.modes.parser import Flag, Options, at_least

SUMMARY = "Judge a model on tasks of the lm-evaluation-harness."
TASKS = "tasks"
FLAGS = (
    shared.MODEL,
    shared.MODEL_PATH,
    shared.SAVE_PATH,
    Flag("tasks", "Names of tasks, such as arc_easy piqa.", TASKS, several=True, metavar="TASK"),
    Flag("task_path", "Folder with tasks of one's own, as the harness describes them.", TASKS, metavar="FOLDER"),
    Flag(
        "num_fewshot", "Examples before each question.", TASKS, kind=int, shown="the task's own", check=at_least(0)
    ),
    Flag(
        "task_limit", "First documents of a task that are judged.", TASKS, kind=int, shown="all", check=at_least(1)
    ),
    replace(shared.EVAL_BATCH_SIZE, help="Requests of a forward pass.", group=TASKS),
    replace(shared.SEED, help="Seed of the harness's draws.", group=TASKS),
    shared.DEV,
    shared.DTYPE,
)  # fmt: skip


def check(options: Options) -> None:
    """Raises: UsageError for a model that is not there."""
    shared.check_subject(options)


def run(options: Options) -> dict[str, Any]:
    from evaluater import run_eval

    return run_eval(options)
