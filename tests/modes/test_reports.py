"""tests/reports: the commands behind the tables of docs/results.md mean what their rows say."""

import PIFA
from component.api.compressing import options_of
from component.modes.m import settings_of
from component.solve.names import EXACT, NARROWING, PLAIN, TUNED
from tests.reports import demo, quality, wikitext2

CONSTANTS = ("drift_factor", "output_shrinkage", "token_power")
OURS = "default"


def parsed(flags: list[str]):
    return PIFA.parse(["--mode", "m", "--DEV", "cpu", *flags])


def test_rows_of_published_methods_have_nothing_of_ours():
    rows = [flags for methods in (wikitext2.METHODS, demo.METHODS) for row, flags in methods.items() if OURS not in row]
    for options in map(parsed, rows):
        recipe = settings_of(options).recipe()
        assert options.allocation == ("iprs" if options.prune == NARROWING else "uniform")
        assert (recipe.drift_factor, recipe.output_shrinkage, recipe.token_power) == (0, None, 0)


def test_the_rows_differ_in_solver_and_storage():
    def what(flags):
        options = parsed(flags)
        return options.prune, options.reconstruct_step, options.use_pifa, options.old_output_factor

    rows = {row: what(flags) for row, flags in wikitext2.METHODS.items()}
    assert rows == {
        "SVD": ("svd", 0, False, 0.25),
        "ASVD": ("asvd", 0, False, 0.25),
        "W": ("svd-llm", 0, False, 0.25),
        "W, 128 windows, seed 103": ("svd-llm", 0, False, 0.25),
        "W + U": ("svd-llm", 1, False, 0),
        "FLAT-LLM": ("flatllm", 0, True, 0),
        "FLAT-LLM, two flows": ("flatllm", 0, True, 0.25),
        "MPIFA, the paper's": ("svd-llm", 2, True, 0.25),
        "MPIFA, exact M": ("svd-llm", EXACT, True, 0.25),
        "default": ("svd-llm", EXACT, True, 0.25),
    }
    steps = {row: (parsed(flags).reconstruct_step, parsed(flags).use_pifa) for row, flags in demo.METHODS.items()}
    assert list(steps.values()) == [(0, False), (0, False), (2, True), (EXACT, True)]
    assert set(demo.PIVOTED) <= set(demo.METHODS) and demo.LAST in demo.PIVOTED.values()


def in_memory(flags: dict) -> dict:
    return vars(options_of({"DEV": "cpu", **flags}))


def test_the_default_row_is_the_bare_command():
    default = vars(parsed(demo.METHODS["default, low-rank"]))
    assert default["allocation"] == "kl" and {name: default[name] for name in CONSTANTS} == TUNED
    flags = in_memory(quality.ABLATION["default"])
    assert flags == {name: default[name] for name in flags}


def test_every_row_of_the_ablation_differs_from_the_default():
    options = [in_memory(flags) for flags in quality.ABLATION.values()]
    assert all(sum(row[key] != options[0][key] for key in row) == 1 for row in options[1:])
    assert PLAIN.keys() == TUNED.keys() == set(CONSTANTS)


def test_forms_are_named_by_their_flags():
    options = {name: in_memory(flags) for name, flags in quality.FORMS.items()}
    assert [one["prune"] for one in options.values()] == ["svd-llm", "svd-llm", "svd-llm", "flatllm", "auto"]
    assert [one["allocation"] for one in options.values()] == ["uniform", "uniform", "kl", "iprs", "kl"]
