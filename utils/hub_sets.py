"""The texts that --dataset takes from the hub, by name: what `datasets.load_dataset` is given for each. Plain data.

splits: the set's own names for what calibrates ("train") and what judges ("test"); column: where the text is.
"""

from typing import Any

HUB_SETS: dict[str, dict[str, Any]] = {
    "wikitext2": {
        "path": "Salesforce/wikitext",
        "name": "wikitext-2-raw-v1",
        "splits": {"train": "train", "test": "test"},
        "column": "text",
    },
    # a script repository: the hub's own parquet conversion of it still loads
    "ptb": {
        "path": "ptb-text-only/ptb_text_only",
        "revision": "refs/convert/parquet",
        "splits": {"train": "train", "test": "test"},
        "column": "sentence",
    },
    "c4": {
        "path": "allenai/c4",
        "data_files": {
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
        "splits": {"train": "train", "test": "validation"},
        "column": "text",
    },
    # instructions with their answers, in the prompt that Alpaca was trained with; it comes in one piece
    "alpaca": {
        "path": "tatsu-lab/alpaca",
        "splits": {"train": "train[:90%]", "test": "train[90%:]"},
        "column": "text",
    },
}
