"""--mode finetune: trains the factors of a checkpoint on text, and writes a checkpoint of the same format."""

from dataclasses import replace
from typing import Any

from component.modes import shared
from component.modes.parser import Flag, Options, at_least

SUMMARY = "Train the factors of a checkpoint on text or on a teacher."
DATA, ADAPTERS, TRAINING = "data", "adapters (--order sequential and joint)", "training"
FLAGS = (
    replace(shared.MODEL_PATH, help="Checkpoint whose factors are trained."),
    shared.SAVE_PATH,
    shared.PREFIX,
    shared.RESUME,
    Flag(
        "data_path", "Instructions (.json, .jsonl), texts, named datasets, or self (the teacher's own text); "
        "NAME:0.02 gives a share.", DATA, several=True, shown="wikitext2:0.02 c4:0.98 with --order full",
        metavar="TEXT",
    ),
    Flag("cutoff_len", "Tokens of a row.", DATA, kind=int, shown="256; full: 1024"),
    Flag(
        "order", "What is trained: adapters on U and then on V (sequential), on both (joint), or all factors (full).",
        TRAINING, shown="sequential", choices=("sequential", "joint", "full"),
    ),
    Flag(
        "teacher", "Model whose distributions are learned in place of the text's next words: a model, or `original`.",
        TRAINING, metavar="MODEL",
    ),
    Flag("num_epochs", "Passes over the data in each stage.", TRAINING, kind=float, shown="2; full: by --max_steps"),
    Flag("max_steps", "Steps of each stage.", TRAINING, kind=int, shown="by --num_epochs; full: 1000"),
    Flag(
        "learning_rate", "Learning rate after warm-up; it falls linearly.", TRAINING, kind=float,
        shown="1e-4; full: 3e-6",
    ),
    Flag("warmup_ratio", "Fraction of the steps that warm up.", TRAINING, kind=float, shown="0.05"),
    Flag("batch_size", "Rows of a step.", TRAINING, kind=int, shown="64; full: 128"),
    Flag("micro_batch_size", "Rows of a forward pass.", TRAINING, kind=int, shown="4; full: 1"),
    Flag(
        "compute_dtype", "Number type of the forward pass: float32 or bfloat16.", TRAINING,
        shown="bfloat16 on a GPU, else float32", metavar="TYPE",
    ),
    Flag(
        "gradient_checkpointing", "Compute activations twice: less memory, a third more time.", TRAINING, kind=bool,
        default=False,
    ),
    Flag(
        "save_steps", "Steps between the states that --resume goes on from; 0 keeps none.", TRAINING, kind=int,
        default=100, check=at_least(0),
    ),
    Flag("lora_r", "Rank of the adapters.", ADAPTERS, kind=int, shown="8"),
    Flag("lora_alpha", "Scale of the adapters times their rank.", ADAPTERS, kind=float, shown="16"),
    Flag("lora_dropout", "Dropout of the adapters' input.", ADAPTERS, kind=float, shown="0.05"),
    replace(shared.SEED, help="Seed of the draws of rows, of dropout and of new adapters.", group=TRAINING),
    shared.DEV,
    shared.DTYPE,
)  # fmt: skip


def check(options: Options) -> None:
    """Raises: UsageError for a folder that is not there."""
    if options.model_path != shared.ORIGINAL:
        shared.check_subject(options)


def run(options: Options) -> dict[str, Any]:
    from component.finetune.stages import run as engine

    return engine(options)
