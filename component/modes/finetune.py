"""--mode finetune: trains the factors of a checkpoint on text, and writes a checkpoint of the same format."""

from dataclasses import replace
from typing import Any

from component.finetune.names import COMPUTE_DTYPES, ORDERS, SELF
from component.finetune.settings import Settings
from component.modes import shared
from component.modes.parser import Flag, Options, above_zero, at_least, within
from component.modes.request import request_of
from utils.errors import UsageError

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
    Flag("cutoff_len", "Tokens of a row.", DATA, kind=int, shown="256; full: 1024", check=at_least(2)),
    Flag(
        "order", "What is trained: adapters on U and then on V (sequential), on both (joint), or all factors (full).",
        TRAINING, shown="sequential", choices=ORDERS,
    ),
    Flag(
        "teacher",
        "Model to learn from in place of the text's next words; `original`: the one that the checkpoint was made "
        "from.", TRAINING, metavar="MODEL",
    ),
    Flag(
        "num_epochs", "Passes over the data in each stage.", TRAINING, kind=float, shown="2; full: by --max_steps",
        check=above_zero,
    ),
    Flag(
        "max_steps", "Steps of each stage.", TRAINING, kind=int, shown="by --num_epochs; full: 1000",
        check=at_least(1),
    ),
    Flag(
        "learning_rate", "Learning rate after warm-up; it falls linearly.", TRAINING, kind=float,
        shown="1e-4; full: 3e-6", check=above_zero,
    ),
    Flag(
        "warmup_ratio", "Fraction of the steps that warm up.", TRAINING, kind=float, shown="0.05",
        check=within("[0", "1)"),
    ),
    Flag("batch_size", "Rows of a step.", TRAINING, kind=int, shown="64; full: 128", check=at_least(1)),
    Flag("micro_batch_size", "Rows of a forward pass.", TRAINING, kind=int, shown="4; full: 1", check=at_least(1)),
    Flag(
        "compute_dtype", "Number type of the forward pass.", TRAINING, shown="bfloat16 on a GPU, else float32",
        choices=COMPUTE_DTYPES,
    ),
    Flag(
        "gradient_checkpointing", "Compute activations twice: less memory, a third more time.", TRAINING, kind=bool,
        default=False,
    ),
    Flag(
        "save_steps", "Steps after which the training state is saved for --resume; 0: never.", TRAINING, kind=int,
        default=100, check=at_least(0),
    ),
    Flag("lora_r", "Rank of the adapters.", ADAPTERS, kind=int, shown="8", check=at_least(1)),
    Flag(
        "lora_alpha", "Numerator of the adapters' scale, lora_alpha / lora_r.", ADAPTERS, kind=float, shown="16",
        check=above_zero,
    ),
    Flag(
        "lora_dropout", "Dropout of the adapters' input.", ADAPTERS, kind=float, shown="0.05",
        check=within("[0", "1)"),
    ),
    replace(shared.SEED, help="Seed of the draws of rows, of dropout and of new adapters.", group=TRAINING),
    shared.DEV,
    shared.DTYPE,
)  # fmt: skip
# of SVD-LLM's recipe for LoRA, and of PIFA, appendix B.3, for all factors
LORA: dict[str, Any] = {
    "data_path": None,
    "num_epochs": 2,
    "max_steps": None,
    "learning_rate": 1e-4,
    "batch_size": 64,
    "micro_batch_size": 4,
    "cutoff_len": 256,
}
FULL: dict[str, Any] = {
    "data_path": ["wikitext2:0.02", "c4:0.98"],
    "num_epochs": None,
    "max_steps": 1000,
    "learning_rate": 3e-6,
    "batch_size": 128,
    "micro_batch_size": 1,
    "cutoff_len": 1024,
}
BOTH: dict[str, Any] = {"lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "warmup_ratio": 0.05}


check = shared.check_folder


def settings_of(options: Options) -> Settings:
    """The flags, with the defaults of the order that was asked for. Raises: UsageError for a value that can't be."""
    order = "sequential" if options.order is None else options.order
    flags = vars(options)
    values = {
        name: default if flags[name] is None else flags[name]
        for name, default in {**BOTH, **(FULL if order == "full" else LORA)}.items()
    }
    if values["data_path"] is None:
        raise UsageError(f"--order {order} needs --data_path: instructions (.json, .jsonl), texts or named datasets")
    values["data_path"] = list(values["data_path"])
    if options.num_epochs is not None or options.max_steps is not None:  # one of them says it all
        values |= {"num_epochs": options.num_epochs, "max_steps": options.max_steps}
    if options.micro_batch_size is None:
        values["micro_batch_size"] = min(values["micro_batch_size"], values["batch_size"])
    if options.compute_dtype is None:
        values["compute_dtype"] = "bfloat16" if options.DEV.startswith("cuda") else "float32"
    else:
        values["compute_dtype"] = options.compute_dtype
    writes = any(entry == SELF or entry.startswith(f"{SELF}:") for entry in values["data_path"])
    if writes and (options.teacher is None or values["max_steps"] is None):
        raise UsageError(f"--data_path {SELF} is what a --teacher writes, for as long as --max_steps says: give both")
    if values["micro_batch_size"] > values["batch_size"]:
        raise UsageError(
            f"--micro_batch_size {values['micro_batch_size']} is above --batch_size {values['batch_size']}"
        )
    return Settings(
        request=request_of(options, prefix=options.prefix),
        order=order,
        seed=options.seed,
        teacher=options.teacher,
        gradient_checkpointing=options.gradient_checkpointing,
        save_steps=options.save_steps,
        **values,
    )


def run(options: Options) -> dict[str, Any]:
    """Fine-tune the checkpoint at --model_path; returns the result record."""
    settings = settings_of(options)

    from component.finetune.folder import finetune_folder

    return finetune_folder(settings)
