"""component/forms.py: which modules are merged under a limit of bytes."""

import pytest
import torch

from component.forms import Form, Module, merged, packed_bytes
from component.gptq import Grid
from component.packed import PackedLinear

DEAR = Module("dear", Form(0.4, 100), Form(0.1, 130))  # 0.01 a byte
CHEAP = Module("cheap", Form(0.3, 100), Form(0.1, 110))  # 0.02 a byte
WORSE = Module("worse", Form(0.1, 100), Form(0.2, 90))
SMALLER = Module("smaller", Form(0.2, 100), Form(0.1, 90))
DENSE = Module("dense", Form(0.0, 50), Form(0.0, 50))


@pytest.mark.parametrize(
    ("limit", "names"),
    [
        (0, {"smaller"}),
        (449, {"smaller"}),
        (450, {"smaller", "cheap"}),  # for what "smaller" gives back
        (469, {"smaller", "cheap"}),
        (480, {"smaller", "cheap", "dear"}),
        (10**6, {"smaller", "cheap", "dear"}),
    ],
)
def test_the_limit_is_spent_where_it_saves_most(limit, names):
    assert merged([DEAR, CHEAP, WORSE, SMALLER, DENSE], limit) == names


def test_what_has_no_room_is_passed_over():
    assert merged([DEAR, CHEAP._replace(matrix=Form(0.1, 105))], 231) == {"cheap"}
    assert merged([DEAR, Module("small", Form(0.2, 100), Form(0.19, 120))], 225) == {"small"}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(12, 40), (7, 19), (64, 64)])
def test_bytes_are_those_of_the_packed_layer(shape, bits):
    layer = PackedLinear(shape[1], shape[0], bits, 16, dtype=torch.float16)
    assert packed_bytes(*shape, Grid(bits, 16)) == sum(t.nbytes for t in layer.buffers())
