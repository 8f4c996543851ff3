"""Loops that are optimised once compute what numba by itself makes of them, and only what Python calls is finished."""
import os
import subprocess
import sys

import pytest

from file import once

pytestmark = pytest.mark.skipif(not once.compile_once(), reason='file/once.py leaves this version of numba as it is')
PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ONCE = 'from file.once import compile_once; assert compile_once()\n'

# A function two calls deep that prints an array, for which it needs its environment, a loop of prange, an exception.
PROGRAM = '''
import numpy as np
from numba import prange
from layer import inner, kernel

@inner
def one_of(x, k):
    print('number', k, 'of', x)
    if k < 0:
        raise ValueError('too small')
    return x[k]

@inner(parallel=True)
def next_of(x, k):
    more = np.empty(len(x))
    for i in prange(len(x)):
        more[i] = x[i] + 1
    return one_of(more, k)

@kernel
def both(x, k):
    return next_of(x, k) + one_of(x, k)

def run():
    print(both(np.arange(4.), 2))
    try:
        both(np.arange(4.), -1)
    except ValueError as error:
        print(error)
'''
OUTPUT = '''number 2 of [1. 2. 3. 4.]
number 2 of [0. 1. 2. 3.]
5.0
number -1 of [1. 2. 3. 4.]
too small
'''

# Of these numba takes addresses while it adds them to what can be called; and machine code made too soon ends a process.
RECURSION = '''
from numba import jit

@jit(nopython=True)
def fibonacci(n):
    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)

@jit(nopython=True)
def fifth():
    return fibonacci(5)

print(fifth(), fibonacci(10))
'''

UNTRIED = '''
from numba.core.registry import cpu_target
from file import once
%s
print(once.compile_once(), type(cpu_target.target_context.codegen()).__name__)
'''

# Each finished library is added to what can be called; memory has one of its own.
FINISHED = '''
from numba.core.codegen import JITCPUCodegen
names = []
def add(self, module, add=JITCPUCodegen._add_module):
    names.append(module.name)
    return add(self, module)
JITCPUCodegen._add_module = add
import program
program.run()
print([name for name in names if name != 'nrt'])
'''

# Every kind of convolution there is, rows with and without what is left of a vector, and the other layers.
LAYERS = '''
import hashlib
import numpy as np
from layer import ConvolutionLayer, FullyConnectLayer, MaxPoolLayer, ReluLayer
rng, digest = np.random.RandomState(0), hashlib.sha256()
def both_ways(layer, *shape):
    outputs = layer.forward(rng.normal(size=shape).astype(np.float32))
    digest.update(outputs)
    digest.update(layer.backward(outputs.astype(np.float64)))
for channels, more, side, kernel_size, padding, stride in (
        (3, 64, 40, 3, 1, 1), (64, 64, 29, 3, 1, 1), (64, 136, 14, 3, 1, 1), (5, 9, 17, 5, 2, 2), (8, 33, 33, 1, 0, 1)):
    layer = ConvolutionLayer(channels, more, kernel_size, padding, stride)
    layer.load_params(rng.normal(size=layer.weight_shape).astype(np.float32), rng.normal(size=more).astype(np.float32))
    both_ways(layer, 1, channels, side, side)
layer = FullyConnectLayer(1030, 37)
layer.load_params(rng.normal(size=layer.weight_shape).astype(np.float32), rng.normal(size=37).astype(np.float32))
both_ways(layer, 2, 1030)
both_ways(MaxPoolLayer(2, 2), 1, 3, 30, 30)
both_ways(MaxPoolLayer(3, 2), 1, 3, 13, 600)
both_ways(ReluLayer(), 1, 3, 13, 13)
print(digest.hexdigest())
'''


def run(script, folder):
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(folder), PROJECT]), NUMBA_CACHE_DIR=str(folder))
    done = subprocess.run([sys.executable, '-c', script], cwd=PROJECT, env=environment, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().replace('\r', '')


@pytest.mark.parametrize('first', ['', ONCE])
@pytest.mark.parametrize('then', ['', ONCE])
def test_it_runs_as_ever_at_first_and_from_the_disk(tmp_path, first, then):
    (tmp_path / 'program.py').write_text(PROGRAM)
    for begin in (first, then):
        assert run(begin + 'import program; program.run()', tmp_path) == OUTPUT


def test_only_what_python_calls_is_made_machine_code_of(tmp_path):
    (tmp_path / 'program.py').write_text(PROGRAM)
    *printed, names = run(ONCE + FINISHED, tmp_path).splitlines()
    assert names == "['both']"
    for path in tmp_path.glob('**/*.nb*'):
        path.unlink()
    *printed, names = run(FINISHED, tmp_path).splitlines()
    assert len(eval(names)) > 5 and 'one_of' in names    # numba by itself; else this test would say nothing


def test_functions_that_call_themselves(tmp_path):
    assert run(ONCE + RECURSION, tmp_path) == '5 55\n'


def test_the_layers_compute_the_same_bits(tmp_path):
    (tmp_path / 'once').mkdir()
    assert run(ONCE + LAYERS, tmp_path / 'once') == run(LAYERS, tmp_path)


def test_the_options_are_those_that_numba_lists():
    from numba.core.compiler import Flags
    assert Flags.values is once.values
    some = Flags()
    some.nrt, some.inline = True, 'always'
    for flags in (Flags(), some, some.copy()):
        assert flags.values() == once.values(flags) == {name: getattr(flags, name) for name in Flags.options}
    assert some == some.copy() != Flags() and hash(some) == hash(some.copy())


@pytest.mark.parametrize('change', ['once.TRIED = (0, 1), (0, 2)', 'del once.cpu_target'])
def test_a_numba_that_was_not_tried_stays_as_it_is(tmp_path, change):
    assert run(UNTRIED % change, tmp_path).split() == ['False', 'JITCPUCodegen']
