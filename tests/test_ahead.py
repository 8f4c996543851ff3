"""The process that compiles the loops that a first run needs late."""
import os
import subprocess
import sys

import numpy as np
import pytest

import handout
from file import ahead
from layer import ConvolutionLayer
from vgg import VGG16, _count

our_loops = pytest.mark.skipif(handout.is_handout(ahead.PROJECT), reason='a hand-out has not the loops compiled ahead')

FIRST_RUN = '''
from file import ahead
import layer
loops = [layer._gradient_by_winograd, layer.MaxPoolLayer._pool_back, layer._fully_connect_back, layer._relu_back,
         layer._unflatten, layer._fully_connect, layer._relu, layer._flatten]
assert not any(map(ahead.is_compiled, loops))
with ahead.late_loops() as wait:
    wait()
assert all(map(ahead.is_compiled, loops))
assert not ahead.is_compiled(layer._outputs_of_inputs)
ahead.compile_first_loops()
assert ahead.is_compiled(layer._outputs_of_inputs)
layer.ConvolutionLayer = None    # nothing is called any more
ahead.compile_first_loops()
ahead.subprocess = None    # none is started any more
with ahead.late_loops() as wait:
    wait()
'''
# The loops of a convolution are the first to be called, so that nothing else has started numba's threads.
SECOND_RUN = '''
import numpy as np
from layer import _gradient_by_winograd
weight = np.ones((2, 1, 3, 3), np.float32)
in_grad = _gradient_by_winograd(np.ones((1, 2, 2, 2)), np.zeros((1, 1, 4, 4)), weight, 0)
assert abs(in_grad.sum() - 72) < 1e-9
from file import ahead
ahead.compile_late_loops()
import layer
loops = [_gradient_by_winograd, layer.MaxPoolLayer._pool_back, layer._fully_connect_back, layer._relu_back,
         layer._unflatten, layer._fully_connect, layer._relu, layer._flatten]
print([(sum(loop.stats.cache_hits.values()), sum(loop.stats.cache_misses.values())) for loop in loops])
'''


def run(script, **environment):
    done = subprocess.run([sys.executable, '-c', script], cwd=ahead.PROJECT, env=dict(os.environ, **environment),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


@our_loops
def test_a_first_run_leaves_the_loops_on_disk_for_the_next(tmp_path):
    run(FIRST_RUN, NUMBA_CACHE_DIR=str(tmp_path))
    assert run(SECOND_RUN, NUMBA_CACHE_DIR=str(tmp_path)).strip() == str([(1, 0)] * 8)


@our_loops
def test_no_layer_of_the_network_needs_the_gradient_that_is_not_compiled_ahead():
    from layer import _winograd_goes_back
    shape = 3, 224, 224
    for layer in VGG16().graph_layers.values():
        outputs = _count(layer, shape)[1]
        if isinstance(layer, ConvolutionLayer):
            out_grad, in_grad = np.empty((1,) + outputs), np.empty((1,) + shape)
            assert _winograd_goes_back(out_grad, in_grad, layer.kernel_size, layer.stride)
        shape = outputs


def test_a_run_that_ends_early_stops_it(monkeypatch):
    started = []

    def popen(*arguments, **options):
        started.append(subprocess.Popen(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(ahead, 'is_compiled', lambda loops: False)
    monkeypatch.setattr(ahead, 'subprocess', type('', (), {'Popen': staticmethod(popen)}))
    with pytest.raises(KeyError):
        with ahead.late_loops():
            raise KeyError
    assert started[0].returncode not in (None, 0)


def test_without_a_process_the_loops_are_compiled_where_they_are_called(monkeypatch):
    def popen(*arguments, **options):
        raise OSError

    monkeypatch.setattr(ahead, 'is_compiled', lambda loops: False)
    monkeypatch.setattr(ahead, 'subprocess', type('', (), {'Popen': staticmethod(popen)}))
    with ahead.late_loops() as wait:
        assert wait() is None


def test_loops_without_a_cache_are_none_to_compile_ahead(monkeypatch):
    assert ahead.is_compiled(len)
    monkeypatch.delattr('layer._outputs_of_inputs', raising=False)    # a student's loops have other names
    monkeypatch.setattr('layer.ConvolutionLayer', None)
    ahead.compile_first_loops()
