"""Loops that are optimised once compute what numba by itself makes of them, and only what Python calls is finished."""
import itertools
import os
import subprocess
import sys

import pytest
from numba.core.errors import TypingError

from file import once

try:
    from numba.core.targetconfig import ConfigStack
except ImportError:    # of a version that stays as it is
    pass

pytestmark = pytest.mark.skipif(not once.compile_once(), reason='file/once.py leaves this version of numba as it is')
PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ONCE = 'from file.once import compile_once; assert compile_once()\n'

# A function two calls deep that prints an array, for which it needs its environment, a loop of prange, a generator, an
# exception.
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

@inner
def some_of(x, k):
    for i in range(k):
        yield x[i]

@kernel
def both(x, k):
    for number in some_of(x, k):
        print(number)
    return next_of(x, k) + one_of(x, k)

def run():
    print(both(np.arange(4.), 2))
    try:
        both(np.arange(4.), -1)
    except ValueError as error:
        print(error)
'''
OUTPUT = '''0.0
1.0
number 2 of [1. 2. 3. 4.]
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


def test_signatures_are_those_that_numba_finds():
    import operator
    from numba import types
    from numba.core.registry import cpu_target
    context = cpu_target.typing_context
    context.refresh()
    numbers = types.int64, types.uint64, types.float32, types.float64, types.boolean, types.literal(3)
    array, unknown = types.Array(types.float32, 2, 'C'), types.unicode_type
    questions = [(f, pair) for f in (operator.add, operator.mul, operator.floordiv, operator.lt)
                 for pair in itertools.product(numbers, numbers)]
    questions += [(min, pair) for pair in itertools.product(numbers[:4], numbers[:4])]
    questions += [(operator.getitem, (array, index)) for index in numbers[:2] + (types.slice2_type, types.UniTuple(
        types.int64, 2), types.Tuple((types.int64, types.slice3_type)), types.ellipsis)]
    questions += [(operator.setitem, (array, types.UniTuple(types.int64, 2), number)) for number in numbers]
    for name, arguments in questions:
        function = context.resolve_value_type(name)
        assert type(function).get_call_type is once.get_call_type
        found = [once.get_call_type(function, context, arguments, {}) for _ in range(2)]
        assert found[0] is found[1] and found[0] == once.look_for_call_type(function, context, arguments, {})
        assert function.get_impl_key(found[0]) is not None
    for _ in range(2):    # and what has none, has none
        with pytest.raises(TypingError):
            context.resolve_value_type(operator.add).get_call_type(context, (array, unknown), {})


def test_a_signature_is_looked_for_once_under_the_same_options(monkeypatch):
    from numba.core.compiler import Flags
    asked = []

    def look(function, context, args, kws):
        asked.append((function, args, kws))
        if args == ('none',):
            raise TypingError('there is none')
        return len(asked)

    monkeypatch.setattr(once, 'look_for_call_type', look)
    monkeypatch.setattr(once, 'SIGNATURES', {})
    ask = once.get_call_type
    for _ in range(2):
        assert [ask('f', 'c', (1, 2), {}), ask('f', 'c', [1, 2], {}), ask('g', 'c', (1, 2), {}),
                ask('f', 'd', (1, 2), {}), ask('f', 'c', (2, 1), {}), ask('f', 'c', (1,), {'b': 2}),
                ask('f', 'c', (1,), {})] == [1, 1, 2, 3, 4, 5, 6]
    flags = Flags()
    with ConfigStack().enter(flags.copy()):
        assert [ask('f', 'c', (1, 2), {}), ask('f', 'c', (1, 2), {})] == [7, 7]
    flags.noalias = True
    with ConfigStack().enter(flags.copy()):
        assert ask('f', 'c', (1, 2), {}) == 8
    for _ in range(2):
        with pytest.raises(TypingError):
            ask('f', 'c', ('none',), {})
    assert len(asked) == 10


def some_loops(x, n):
    total, k = 0, 0
    for i in range(n):
        if x[i] > 0:
            k, total = i, total + x[i]
        else:
            total -= k
    while k > 0:
        k //= 2
    return total, k


def some_numbers(n):
    for i in range(n):
        before = i
        yield i
        yield before + n


@pytest.mark.parametrize('function', [some_loops, some_numbers])
def test_lifetimes_are_those_that_numba_works_out(function):
    from numba.core.compiler import run_frontend
    from numba.core.postproc import PostProcessor
    assert PostProcessor.run is once.run
    waiting, whole = run_frontend(function), run_frontend(function)
    once.process_all(PostProcessor(whole))
    assert waiting.is_generator or not waiting.block_entry_vars and whole.block_entry_vars
    assert list(waiting.blocks) == list(whole.blocks)
    assert waiting.variable_lifetime.livemap == whole.variable_lifetime.livemap
    assert waiting.variable_lifetime.deadmaps == whole.variable_lifetime.deadmaps
    assert (waiting.generator_info is None) == (whole.generator_info is None) == (function is some_loops)
    ends = []
    for ir in waiting, whole:
        PostProcessor(ir).run(emit_dels=True)
        assert ir.block_entry_vars
        ends.append([str(instruction) for block in ir.blocks.values() for instruction in block.body])
    assert ends[0] == ends[1] and any(line.startswith('del ') for line in ends[0])


@pytest.mark.parametrize('change', ['once.TRIED = (0, 1), (0, 2)', 'del once.cpu_target'])
def test_a_numba_that_was_not_tried_stays_as_it_is(tmp_path, change):
    assert run(UNTRIED % change, tmp_path).split() == ['False', 'JITCPUCodegen']
