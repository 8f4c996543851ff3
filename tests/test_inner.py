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


def add_with(word):
    """`add`, with one of layer.py's words to the compiler before its loop."""
    @jit(nopython=True)
    def add_so(out, x):
        word()
        for p in range(len(out)):
            out[p] = out[p] + x[p]

    return add_so


def test_the_stack_is_aligned():
    assert 'alignstack=64' in text_of(add_with(layer._align_stack))


def test_the_widest_vectors_are_asked_for_and_taken():
    compiled = add_with(layer._widest_vectors)
    assert '"prefer-vector-width"="512"' in text_of(compiled)
    if get_host_cpu_features().get('avx512f'):
        assert '%zmm' in compiled.inspect_asm(compiled.signatures[0])
