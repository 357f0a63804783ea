"""component/quantize/forms.py: what modules are stored as under a limit of bytes."""

import pytest
import torch

from component.format.packed import PackedLinear
from component.quantize.forms import FACTORED, MATRIX, WIDE_OUTER, Form, chosen, packed_bytes
from component.quantize.gptq import Grid

MODULES = {
    "dear": [Form(MATRIX, 0.1, 130), Form(FACTORED, 0.4, 100)],  # saves 0.01 a byte
    "cheap": [Form(MATRIX, 0.1, 110), Form(FACTORED, 0.3, 100)],  # 0.02
    "worse": [Form(MATRIX, 0.2, 110), Form(FACTORED, 0.1, 100)],
    "smaller": [Form(MATRIX, 0.1, 90), Form(FACTORED, 0.2, 100)],
    "dense": [Form(MATRIX, 0.0, 50)],
}
NEVER = {"worse": FACTORED, "smaller": MATRIX, "dense": MATRIX}


@pytest.mark.parametrize(
    ("limit", "dear", "cheap"),
    [
        (0, FACTORED, FACTORED),
        (449, FACTORED, FACTORED),
        (450, FACTORED, MATRIX),
        (479, FACTORED, MATRIX),
        (480, MATRIX, MATRIX),
        (10**6, MATRIX, MATRIX),
    ],
)
def test_the_limit_is_spent_where_it_saves_most(limit, dear, cheap):
    assert chosen(MODULES, limit) == {"dear": dear, "cheap": cheap, **NEVER}


def test_what_has_no_room_is_passed_over():
    modules = {"dear": MODULES["dear"], "slow": [Form(MATRIX, 0.19, 120), Form(FACTORED, 0.2, 100)]}
    assert chosen(modules, 225) == {"dear": FACTORED, "slow": MATRIX}


def test_a_module_goes_from_form_to_form():
    forms = {"one": [Form(FACTORED, 0.4, 100), Form(WIDE_OUTER, 0.1, 110), Form(MATRIX, 0.05, 150)]}
    kinds = [chosen(forms, limit)["one"] for limit in (100, 110, 149, 150)]
    assert kinds == [FACTORED, WIDE_OUTER, WIDE_OUTER, MATRIX]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(12, 40), (7, 19), (64, 64)])
def test_bytes_are_those_of_the_packed_layer(shape, bits):
    layer = PackedLinear(shape[1], shape[0], bits, 16, dtype=torch.float16)
    assert packed_bytes(*shape, Grid(bits, 16)) == sum(t.nbytes for t in layer.buffers())
