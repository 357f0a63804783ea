"""--mode bi: how far each decoder layer turns the hidden states (FLAT-LLM's influence), saved in a file."""

from dataclasses import replace
from typing import Any

from component.channels.settings import InfluenceSettings
from component.modes import shared
from component.modes.parser import Options

SUMMARY = "Measure the influence of each layer, for --prune flatllm."
FLAGS = (
    shared.MODEL,
    shared.SAVE_PATH,
    shared.PREFIX,
    shared.OVERALL_RATIO,
    shared.DENSITY,
    replace(shared.BI_SCORE, help="JSON file that is written.", shown="<name>-bi.json under --save_path"),
    shared.DATASET,
    replace(shared.MODEL_SEQ_LEN, default=shared.by_device(512, 2048, announced=False)),
    replace(
        shared.RECONSTRUCT_NSAMPLES, help="Windows that the influence is measured on.",
        default=shared.by_device(16, 128, announced=False),
    ),
    shared.HELDOUT_NSAMPLES,
    shared.SEED,
    shared.DEV,
    shared.DTYPE,
)  # fmt: skip


def check(options: Options) -> None:
    """Raises: UsageError for a text or a model that can't be."""
    shared.fill_density(options)
    shared.one_text(options)
    shared.check_source(options)


def settings_of(options: Options) -> InfluenceSettings:
    return shared.as_settings(InfluenceSettings, options, device=options.DEV)


def run(options: Options) -> dict[str, Any]:
    """Measure, save and print; returns the result record."""
    from component.channels.influence import measure_influence

    return measure_influence(settings_of(options))
