"""Memory that is freed and taken again."""
import os
import platform
import subprocess
import sys

import pytest

from file import memory

# 40 MB are more than the C library ever keeps by itself.
FAULTS = '''
import ctypes
import resource
from file import memory
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)    # PR_SET_THP_DISABLE: pages of 2 MB would make few faults of either way
if %r:
    assert memory.keep_what_is_freed()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b'x' * 40000000
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
'''

# The processor notes when a result was too small for its normal form; a layer's arrays get memory full of such numbers.
TINY = '''
import ctypes
import numpy as np
from numba import set_num_threads
from file import memory
from layer import ConvolutionLayer
assert memory.keep_what_is_freed()
set_num_threads(1)
math, rng = ctypes.CDLL('libm.so.6'), np.random.RandomState(0)
FE_UNDERFLOW = 16

def underflows(work, x):
    work(x)
    np.full(3 * 10**7, 1e-40, np.float32)
    math.feclearexcept(FE_UNDERFLOW)
    work(x)
    return math.fetestexcept(FE_UNDERFLOW) != 0

for ins, outs, side in ((64, 64, 14), (64, 64, 28), (3, 64, 28), (64, 67, 28), (262, 259, 28)):
    layer = ConvolutionLayer(ins, outs, 3, 1, 1)
    layer.load_params(rng.normal(0, 1, layer.weight_shape).astype(np.float32), np.zeros(outs, np.float32))
    x, out_grad = rng.normal(0, 1, (1, ins, side, side)).astype(np.float32), rng.normal(0, 1, (1, outs, side, side))
    print(underflows(layer.forward, x), underflows(layer.backward, out_grad))
print(underflows(layer.forward, x * np.float32(1e-38)), underflows(layer.backward, out_grad * 1e-308))
'''


def lines_of(script):
    return subprocess.run([sys.executable, '-c', script], stdout=subprocess.PIPE, check=True, universal_newlines=True,
                          cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__)))).stdout.splitlines()


@pytest.mark.stage100
@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc' or platform.machine() != 'x86_64',
                    reason='the flag has its number from there')
def test_convolutions_multiply_nothing_that_they_did_not_write():
    """Such numbers have no part in the results, but many processors take far longer to multiply them."""
    lines = lines_of(TINY)
    if lines.pop() != 'True True':
        pytest.skip('the loops do not run on the thread whose notes can be read')
    assert lines == 5 * ['False False']


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='only glibc is told')
def test_what_is_freed_is_taken_again():
    def faults(keep):
        return int(lines_of(FAULTS % keep)[0])

    assert faults(keep=True) < 1000 < faults(keep=False)


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(memory.ctypes, 'CDLL', lambda name: object())
    assert memory.keep_what_is_freed() is False
