"""What layer.py tells the compiler beside its loops reaches it: numba would drop it without a word."""
import re

import pytest
from llvmlite.binding import get_host_cpu_features
from numba import float64, jit
from numba.core.compiler import Flags

import layer


def add(out, x):
    for p in range(len(out)):
        out[p] = out[p] + x[p]


def text_of(compiled):
    """What the compiler is left with, for two arrays."""
    compiled.compile((float64[::1], float64[::1]))
    return compiled.inspect_llvm(compiled.signatures[0])


@pytest.mark.skipif(not hasattr(Flags(), 'noalias'), reason='this numba has no such flag')
def test_disjoint_arrays_are_promised_to_be():
    promise = r'noalias[^,]*%"?\.?arg\.(out|x)'
    assert not re.search(promise, text_of(layer.inner(add)))
    assert re.search(promise, text_of(layer.inner(add, disjoint=True)))


def test_the_stack_is_aligned():
    @jit(nopython=True)
    def add_aligned(out, x):
        layer._align_stack()
        for p in range(len(out)):
            out[p] = out[p] + x[p]

    assert 'alignstack=64' in text_of(add_aligned)


def test_the_widest_vectors_are_asked_for_and_taken():
    @jit(nopython=True)
    def add_widely(out, x):
        layer._widest_vectors()
        for p in range(len(out)):
            out[p] = out[p] + x[p]

    assert '"prefer-vector-width"="512"' in text_of(add_widely)
    if get_host_cpu_features().get('avx512f'):
        assert '%zmm' in add_widely.inspect_asm(add_widely.signatures[0])
