"""--mode eval: zero-shot tasks of the lm-evaluation-harness."""

import importlib.metadata
import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

from component.modes import shared
from component.modes.parser import Flag, Options, at_least
from utils.errors import UsageError

REQUIREMENTS = "requirements-eval.txt"
SUMMARY = "Judge a model on tasks of the lm-evaluation-harness."
TASKS = "tasks"
FLAGS = (
    shared.SUBJECT,
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


check = shared.check_subject


def run(options: Options) -> dict[str, Any]:
    """Print the tasks' measures; returns the result record.

    Raises: UsageError without the harness, or for a task that it does not know.
    """
    manager = task_manager(options.tasks, options.task_path)

    from component.modes.subject import find_subject, load_judged
    from evaluater import zero_shot
    from utils.report import markdown_table

    source, tokenizer = find_subject(options)
    model, watch, record = load_judged(source, options)
    results = zero_shot(
        model,
        tokenizer,
        options.tasks,
        manager=manager,
        batch_size=options.eval_batch_size,
        num_fewshot=options.num_fewshot,
        limit=options.task_limit,
        seed=options.seed,
    )
    rows = [[task, measure, value] for task, values in results.items() for measure, value in values.items()]
    print(markdown_table(["task", "measure", "value"], rows))
    return {
        **record,
        "mode": "eval",
        "dataset": ", ".join(results),
        "tasks": results,
        "num_fewshot": options.num_fewshot,
        "task_limit": options.task_limit,
        "lm_eval": importlib.metadata.version("lm_eval"),
        **watch.readings(),
    }


def task_manager(tasks: list[str] | None, task_path: str | None) -> Any:
    """The harness's manager, which also knows the tasks in the folder task_path.

    Raises: UsageError without tasks, without the harness, or for a task that it does not know.
    """
    if not tasks:
        raise UsageError(
            "--mode eval needs --tasks, such as --tasks arc_easy piqa; --task_path names a folder of own ones"
        )
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError(f"--mode eval needs the lm-evaluation-harness: pip install -r {REQUIREMENTS}")
    if task_path is not None and not Path(task_path).is_dir():
        raise UsageError(f"no such folder of tasks: {task_path}")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=task_path)
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise UsageError(
            f"unknown task {unknown[0]}: `lm_eval ls tasks` lists them, --task_path adds a folder of own ones"
        )
    return manager
