"""component/quantize/names.py: the choices that the front door knows are those of the code that it does not import."""

from component.format import packed
from component.quantize import names


def test_bits_are_those_that_a_packed_layer_can_have():
    assert names.BITS == packed.BITS
