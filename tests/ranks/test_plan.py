"""component/ranks/plan.py: plans survive the round trip through a file, and wrong files are refused."""

import json

import pytest

from component.ranks.allocation import Module
from component.ranks.plan import plan_as_json, read_plan
from component.ranks.sizes import DENSE, Rank
from utils.errors import UsageError

MODULES = [Module("a", 8, 6, attention=True), Module("b", 4, 6, attention=False)]
GOOD = {"format_version": 1, "layers": {"a": 3, "b": "dense"}}


def test_a_plan_survives_the_file(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan_as_json({"a": Rank(3), "b": DENSE})))
    assert json.loads(path.read_text()) == GOOD
    assert read_plan(path, MODULES) == {"a": Rank(3), "b": DENSE}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "cannot read"),
        (json.dumps([1]), "is no plan"),
        (json.dumps({**GOOD, "format_version": 2}), "is no plan"),
        (json.dumps({**GOOD, "layers": {"a": 3}}), "differ in 1 modules, such as b"),
        (json.dumps({**GOOD, "layers": {"a": 7, "b": 1}}), "not 7"),
        (json.dumps({**GOOD, "layers": {"a": True, "b": 1}}), "not True"),
    ],
)
def test_wrong_plans_are_refused(tmp_path, content, message):
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        read_plan(path, MODULES)
