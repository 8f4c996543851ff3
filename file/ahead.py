"""Compile loops that a run needs late in a process of its own, beside the first run of main.py.

numba compiles a loop when it is first called, on one core, and puts the machine code on disk for later runs.  In a
first run most loops of the forward pass are compiled where they are needed, those of a convolution while the checkpoint
is written; those of the backward pass, which are others, are compiled here meanwhile, and only read from the disk when
it is their turn.  So are some small ones of the forward pass, while main.py compiles its first convolution: then both
processes have about the same to do.
"""
import contextlib
import gc
import os
import subprocess
import sys

import numpy as np

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def is_compiled(loops):
    """Whether numba has machine code of these loops, as they are now, on disk; also where it never puts any there."""
    try:
        return bool(loops._cache._cache_file._load_index())
    except (AttributeError, OSError):
        return True


@contextlib.contextmanager
def late_loops():
    """Compile the late loops, where that is still to be done, while the block runs.

    Yields
    ------
    callable
        Waits until it is done.  If it fails, the loops are compiled where they are called, as without this.
    """
    import layer
    process = None
    if not is_compiled(getattr(layer, '_gradient_by_winograd', None)):    # a student's loops have other names
        with contextlib.suppress(OSError), open(os.devnull, 'r+b') as nothing:
            process = subprocess.Popen([sys.executable, os.path.abspath(__file__)], stdin=nothing, stdout=nothing,
                                       stderr=nothing)
    try:
        yield process.wait if process else lambda: None
    finally:
        if process:
            process.kill()    # the block ended early, or it is over anyway
            process.wait()


def compile_first_loops():
    """Compile the loops of a convolution, which a forward pass calls first, unless they are on disk already."""
    import layer
    if not is_compiled(getattr(layer, '_outputs_of_inputs', None)):
        convolution = layer.ConvolutionLayer(1, 1, 1)
        convolution.load_params(np.zeros((1, 1, 1, 1), dtype=np.float32), np.zeros(1, dtype=np.float32))
        convolution.forward(np.zeros((1, 1, 1, 1), dtype=np.float32))


def compile_late_loops():
    """Call the late loops on next to nothing, with the dtypes of a run: float64 gradients, all else float32."""
    from layer import ConvolutionLayer, FlattenLayer, FullyConnectLayer, MaxPoolLayer, ReluLayer
    connection = FullyConnectLayer(1, 1)
    connection.load_params(np.zeros((1, 1), dtype=np.float32), np.zeros(1, dtype=np.float32))
    relu, flatten, picture = ReluLayer(), FlattenLayer(), np.zeros((1, 1, 1, 1), dtype=np.float32)
    for layer, inputs in (relu, picture), (flatten, picture), (connection, picture[0, 0]):    # first: not waited for
        layer.forward(inputs)

    gradient = np.zeros((1, 32, 14, 14))    # enough for the way that a convolution takes in the network
    convolution = ConvolutionLayer(32, 32, 3, padding=1)
    convolution.load_params(np.zeros((32, 32, 3, 3), dtype=np.float32), np.zeros(32, dtype=np.float32))
    convolution.input_shape = convolution.output_shape = gradient.shape
    convolution.backward(gradient)

    pooling = MaxPoolLayer(1, 1)
    pooling.input_shape = pooling.output_shape = gradient.shape
    pooling.argidx = np.zeros(gradient.shape, dtype=np.int32)
    pooling.backward(gradient)

    gradient = np.zeros((1, 1, 1, 1))
    relu.backward(gradient)
    flatten.backward(gradient[0, 0])
    connection.backward(gradient[0, 0])


if __name__ == '__main__':
    sys.path[0] = PROJECT
    from file import once
    once.compile_once()
    gc.disable()    # the process ends before it would pay
    compile_late_loops()
    gc.freeze()    # main.py would wait while Python looks for cycles nevertheless, in the end
