"""Each layer against the formulas, to the bit; against others' code; and against numerical gradients."""
import copy
import os
import pickle
import subprocess
import sys

import numba
import numpy as np
import pytest
from scipy.signal import correlate

import textbook
from layer import ConvolutionLayer, FlattenLayer, FullyConnectLayer, MaxPoolLayer, ReluLayer
from test_calls import numbers

try:
    import torch
except ImportError:
    torch = None

needs_torch = pytest.mark.skipif(torch is None, reason='torch is not installed')

# batch, in_channels, out_channels, height, width, kernel_size, padding, stride
CONVOLUTIONS = [
    (1, 1, 1, 1, 1, 1, 0, 1),
    (1, 3, 4, 8, 8, 3, 1, 1),
    (3, 4, 8, 14, 14, 3, 1, 1),       # a plane in one band, groups of four channels
    (2, 5, 9, 9, 11, 3, 1, 1),        # channels beyond the last group
    (1, 3, 5, 40, 37, 3, 1, 1),       # a plane in several bands
    (1, 2, 2, 3, 1500, 3, 1, 1),      # a row longer than a band
    (1, 2, 3, 2600, 1, 3, 1, 1),
    (2, 3, 4, 12, 7, 5, 2, 2),
    (1, 2, 3, 13, 10, 2, 0, 3),       # a stride larger than the kernel: some pixels are never read
    (1, 4, 3, 7, 7, 7, 3, 2),
    (2, 8, 1, 6, 5, 1, 0, 1),
    (1, 3, 2, 9, 9, 1, 2, 2),
    (1, 1, 6, 5, 40, 4, 1, 1),
    (1, 2, 3, 9, 8, 3, 5, 4),         # more padding than kernel
    (1, 64, 31, 14, 15, 3, 1, 1),
    (2, 130, 36, 16, 17, 3, 1, 1),
    (0, 2, 3, 6, 6, 3, 1, 1),
]
# batch, channels, height, width, kernel_size, stride
POOLINGS = [(1, 1, 2, 2, 2, 2), (2, 3, 8, 6, 2, 2), (1, 2, 7, 9, 2, 2), (2, 2, 9, 9, 3, 2), (1, 3, 8, 40, 3, 1),
            (1, 2, 11, 10, 2, 3), (3, 1, 5, 5, 5, 5), (1, 4, 6, 6, 1, 1), (2, 3, 70, 50, 2, 2), (0, 2, 4, 4, 2, 2)]
# batch, in_features, out_features
CONNECTIONS = [(1, 1, 1), (1, 7, 4), (3, 512, 9), (2, 1023, 6), (5, 1100, 13), (8, 40, 5), (2, 16389, 5), (0, 6, 3)]


def convolution(case, dtype=np.float64):
    """A layer with random parameters, an input, and that input in its frame."""
    batch, in_channels, out_channels, height, width, kernel_size, padding, stride = case
    layer = ConvolutionLayer(in_channels, out_channels, kernel_size, padding, stride)
    layer.load_params(numbers(out_channels, in_channels, kernel_size, kernel_size, dtype=dtype),
                      numbers(out_channels, dtype=dtype))
    inputs = numbers(batch, in_channels, height, width, dtype=dtype)
    frame = ((0, 0), (0, 0), (padding, padding), (padding, padding))
    return layer, inputs, np.pad(inputs, frame, mode='constant')


def convolved(layer, inputs_pad, shape, dtype):
    """What the textbook makes of it."""
    return textbook.conv(inputs_pad, np.zeros(shape, dtype), layer.weight, layer.bias, layer.kernel_size, layer.stride)


def convolved_back(layer, out_grad, inputs, inputs_pad):
    P, (height, width) = layer.padding, inputs.shape[2:]
    in_grad = textbook.conv_back(out_grad, np.zeros(inputs_pad.shape), layer.weight, layer.kernel_size, layer.stride)
    return in_grad[:, :, P:P + height, P:P + width]


def pooling(case):
    batch, channels, height, width, kernel_size, stride = case
    return MaxPoolLayer(kernel_size, stride), numbers(batch, channels, height, width)


def connection(case, dtype=np.float64):
    batch, in_features, out_features = case
    layer = FullyConnectLayer(in_features, out_features)
    layer.load_params(numbers(out_features, in_features, dtype=dtype), numbers(out_features, dtype=dtype))
    return layer, numbers(batch, in_features, dtype=dtype)


def assert_numerical_gradient(forward, inputs, out_grad, gradient):
    """d sum(out_grad * forward(x)) / dx by central differences, at up to 40 places, in float64."""
    assert np.abs(gradient).max() > 0
    step = 1e-6
    for place in np.random.RandomState(1).permutation(inputs.size)[:40]:
        moved = np.zeros(inputs.size)
        moved[place] = step
        moved = moved.reshape(inputs.shape)
        slope = np.sum((forward(inputs + moved) - forward(inputs - moved)) * out_grad) / (2 * step)
        np.testing.assert_allclose(gradient.flat[place], slope, rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------------- convolution

@pytest.mark.parametrize('dtype', [np.float32, np.float64])
@pytest.mark.parametrize('case', CONVOLUTIONS)
def test_convolution_is_the_formula_to_the_bit(case, dtype):
    """Forward, and backward on float64 gradients, where the seven plain loops add in the same order."""
    layer, inputs, inputs_pad = convolution(case, dtype)
    outputs = layer.forward(inputs)
    assert outputs.dtype == dtype and layer.input_shape == inputs.shape
    np.testing.assert_array_equal(outputs, convolved(layer, inputs_pad, outputs.shape, dtype))
    out_grad = numbers(*outputs.shape, seed=1)
    in_grad = layer.backward(out_grad)
    assert in_grad.dtype == np.float64
    np.testing.assert_array_equal(in_grad, convolved_back(layer, out_grad, inputs, inputs_pad))
    np.testing.assert_array_equal(layer.backward(out_grad), in_grad)


def test_convolution_of_random_shapes_is_the_formula_to_the_bit():
    rng = np.random.RandomState(20)
    for trial in range(150):
        kernel_size, padding, stride = rng.randint(1, 6), rng.randint(0, 4), rng.randint(1, 5)
        least = max(1, kernel_size - 2 * padding)
        case = (rng.randint(0, 4), rng.randint(1, 10), rng.randint(1, 10), rng.randint(least, 25),
                rng.randint(least, 60), kernel_size, padding, stride)
        dtype = (np.float32, np.float64)[trial % 2]
        layer, inputs, inputs_pad = convolution(case, dtype)
        outputs = layer.forward(inputs)
        np.testing.assert_array_equal(outputs, convolved(layer, inputs_pad, outputs.shape, dtype), str(case))
        out_grad = numbers(*outputs.shape, seed=trial)
        expected = convolved_back(layer, out_grad, inputs, inputs_pad)
        np.testing.assert_array_equal(layer.backward(out_grad), expected, str(case))


def test_convolution_with_weights_of_another_dtype_is_the_formula_to_the_bit():
    """As the initial ones are, float64 beside a float32 picture: the sums are as precise as the more precise of both."""
    layer, inputs, inputs_pad = convolution((2, 3, 5, 9, 8, 3, 1, 1))
    single = inputs.astype(np.float32)
    outputs = layer.forward(single)
    expected = convolved(layer, inputs_pad.astype(np.float32), outputs.shape, np.float32)
    assert outputs.dtype == np.float32
    np.testing.assert_array_equal(outputs, expected)


def test_convolution_gradient_of_float32_numbers_is_that_of_the_same_in_float64():
    layer, inputs, _ = convolution((2, 3, 5, 9, 9, 3, 0, 1))
    single = layer.forward(inputs).astype(np.float32)
    np.testing.assert_array_equal(layer.backward(single), layer.backward(single.astype(np.float64)))


@pytest.mark.parametrize('case', CONVOLUTIONS)
def test_convolution_is_scipys(case):
    layer, inputs, inputs_pad = convolution(case)
    S = layer.stride
    expected = [[layer.bias[c] + correlate(picture, layer.weight[c], mode='valid')[0, ::S, ::S]
                 for c in range(layer.out_channels)] for picture in inputs_pad]
    outputs = layer.forward(inputs)
    np.testing.assert_allclose(outputs, np.reshape(expected, outputs.shape), rtol=1e-9, atol=1e-9)


@needs_torch
@pytest.mark.parametrize('case', CONVOLUTIONS)
def test_convolution_and_gradient_are_torchs(case):
    layer, inputs, _ = convolution(case)
    x = torch.tensor(inputs, requires_grad=True)
    y = torch.nn.functional.conv2d(x, torch.tensor(layer.weight), torch.tensor(layer.bias), layer.stride, layer.padding)
    np.testing.assert_allclose(layer.forward(inputs), y.detach().numpy(), rtol=1e-9, atol=1e-9)
    out_grad = numbers(*y.shape, seed=2)
    y.backward(torch.tensor(out_grad))
    np.testing.assert_allclose(layer.backward(out_grad), x.grad.numpy(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('case', [case for case in CONVOLUTIONS if case[0] and max(case[3:5]) < 100])
def test_convolution_gradient_is_the_slope(case):
    layer, inputs, _ = convolution(case)
    out_grad = numbers(*layer.forward(inputs).shape, seed=3)
    assert_numerical_gradient(layer.forward, inputs, out_grad, layer.backward(out_grad))


def test_equal_windows_give_equal_numbers():
    """Wherever in a plane, a band or a group of channels they lie: maxima that tie stay ties."""
    layer = ConvolutionLayer(20, 9, 3)
    layer.load_params(np.repeat(numbers(1, 20, 3, 3, dtype=np.float32), 9, axis=0), np.ones(9, np.float32))
    window = numbers(1, 20, 3, 3, dtype=np.float32)
    outputs = layer.forward(np.tile(window, (2, 1, 17, 19)))[:, :, ::3, ::3]
    assert np.unique(outputs).size == 1


# --------------------------------------------------------------------------------------------------- pooling

@pytest.mark.parametrize('dtype', [np.float32, np.float64])
@pytest.mark.parametrize('case', POOLINGS)
def test_pooling_is_the_formula(case, dtype):
    layer, inputs = pooling(case)
    inputs = np.round(inputs).astype(dtype)    # whole numbers: many ties
    outputs = layer.forward(inputs)
    expected, argidx = textbook.pool(np.zeros_like(outputs), inputs, np.zeros(outputs.shape, np.int32),
                                     layer.kernel_size, layer.stride)
    assert outputs.dtype == dtype and layer.argidx.dtype == np.int32
    assert layer.input_shape == inputs.shape and layer.output_shape == outputs.shape
    np.testing.assert_array_equal(outputs, expected)
    np.testing.assert_array_equal(layer.argidx, argidx)
    out_grad = numbers(*outputs.shape, seed=1)
    expected = textbook.pool_back(out_grad, np.zeros(inputs.shape), argidx, layer.kernel_size, layer.stride)
    in_grad = layer.backward(out_grad)
    assert in_grad.dtype == np.float64
    np.testing.assert_array_equal(in_grad, expected)


@pytest.mark.parametrize('case', [case for case in POOLINGS if case[0]])
def test_pooling_is_np_max_and_its_gradient_the_slope(case):
    layer, inputs = pooling(case)
    # a shuffled ladder: no two numbers are closer than the steps of the test
    inputs = np.random.RandomState(5).permutation(inputs.size).reshape(inputs.shape) * 0.1
    outputs, K, S = layer.forward(inputs), layer.kernel_size, layer.stride
    for h in range(outputs.shape[2]):
        for w in range(outputs.shape[3]):
            window = inputs[:, :, h * S:h * S + K, w * S:w * S + K]
            np.testing.assert_array_equal(outputs[:, :, h, w], window.max(axis=(2, 3)))
    out_grad = numbers(*outputs.shape, seed=2)
    assert_numerical_gradient(layer.forward, inputs, out_grad, layer.backward(out_grad))


@needs_torch
@pytest.mark.parametrize('case', [case for case in POOLINGS if case[0]])
def test_pooling_and_gradient_are_torchs(case):
    layer, inputs = pooling(case)
    x = torch.tensor(inputs, requires_grad=True)
    y = torch.nn.functional.max_pool2d(x, layer.kernel_size, layer.stride)
    np.testing.assert_array_equal(layer.forward(inputs), y.detach().numpy())
    out_grad = numbers(*y.shape, seed=2)
    y.backward(torch.tensor(out_grad))
    np.testing.assert_allclose(layer.backward(out_grad), x.grad.numpy(), rtol=1e-12, atol=1e-12)


def test_pooling_takes_a_nan_as_np_max_does():
    inputs = numbers(1, 2, 6, 8)
    inputs[0, 0, 1, 1] = inputs[0, 0, 0, 2] = inputs[0, 1, 0, 0] = np.nan
    inputs[0, 1, 3, 3], inputs[0, 1, 4:, :2] = np.inf, -np.inf
    outputs = MaxPoolLayer().forward(inputs)
    np.testing.assert_array_equal(outputs, inputs.reshape(1, 2, 3, 2, 4, 2).max(axis=(3, 5)))


def test_overlapping_windows_add_their_gradients():
    inputs = np.zeros((1, 1, 3, 3))
    inputs[0, 0, 1, 1] = 1    # the maximum of all four windows
    layer = MaxPoolLayer(kernel_size=2, stride=1)
    layer.forward(inputs)
    np.testing.assert_array_equal(layer.backward(np.array([[[[1., 2.], [4., 8.]]]])), 15 * inputs)


# ------------------------------------------------------------------------------------ relu, flatten, connect

@pytest.mark.parametrize('shape', [(), (3,), (2, 5), (2, 3, 4, 5), (0, 4)])
def test_relu(shape):
    layer, inputs, out_grad = ReluLayer(), numbers(*shape, dtype=np.float32), numbers(*shape, seed=1)
    outputs = layer.forward(inputs)
    assert outputs.dtype == np.float32 and outputs.shape == shape
    np.testing.assert_array_equal(outputs, np.maximum(inputs, 0))
    np.testing.assert_array_equal(layer.backward(out_grad), np.where(inputs > 0, out_grad, 0))


def test_relu_gradient_passes_where_the_input_was_positive():
    layer = ReluLayer()
    outputs = layer.forward(np.array([[-1., 0., 2., np.nan, np.inf, -np.inf]]))
    np.testing.assert_array_equal(outputs, [[0, 0, 2, np.nan, np.inf, 0]])
    np.testing.assert_array_equal(layer.backward(np.full((1, 6), 3.)), [[0, 0, 3, 0, 3, 0]])


def test_flatten():
    layer, inputs, out_grad = FlattenLayer(), numbers(2, 3, 4, 5, dtype=np.float32), numbers(2, 60)
    np.testing.assert_array_equal(layer.forward(inputs), inputs.reshape(2, 60))
    np.testing.assert_array_equal(layer.backward(out_grad), out_grad.reshape(2, 3, 4, 5))


@pytest.mark.parametrize('case', CONNECTIONS)
def test_fully_connected_is_the_formula_to_the_bit(case):
    layer, inputs = connection(case)
    outputs = layer.forward(inputs)
    expected = textbook.fully_connect(inputs, np.zeros_like(outputs), layer.weight, layer.bias)
    np.testing.assert_array_equal(outputs, expected)
    np.testing.assert_allclose(outputs, inputs @ layer.weight.T + layer.bias, rtol=1e-11, atol=1e-11)
    out_grad = numbers(*outputs.shape, seed=1)
    for grad in out_grad, np.maximum(out_grad, 0), np.zeros_like(out_grad), np.full_like(out_grad, np.nan):
        expected = textbook.fully_connect_back(grad, np.zeros_like(inputs), layer.weight)
        np.testing.assert_array_equal(layer.backward(grad), expected)    # rows that meet zeros alone are not read
        expected = textbook.fully_connect_grad(grad, inputs, np.zeros(layer.weight.shape), np.zeros(layer.bias.shape))
        np.testing.assert_array_equal(layer.grad_weight, expected[0])
        np.testing.assert_array_equal(layer.grad_bias, expected[1])


def test_fully_connected_gradient_is_the_slope():
    layer, inputs = connection((3, 20, 7))
    out_grad = numbers(3, 7, seed=2)
    layer.forward(inputs)
    assert_numerical_gradient(layer.forward, inputs, out_grad, layer.backward(out_grad))

    def with_weight(weight):
        layer.weight = weight
        return layer.forward(inputs)
    assert_numerical_gradient(with_weight, layer.weight, out_grad, layer.grad_weight)


def test_fully_connected_step_goes_downhill_and_leaves_the_old_arrays():
    layer, inputs = connection((3, 20, 7))
    weight, bias = layer.weight, layer.bias
    kept = weight.copy(), bias.copy()
    outputs = layer.forward(inputs)
    layer.backward(outputs)    # the gradient of sum(outputs ** 2) / 2
    step = layer.grad_weight.copy(), layer.grad_bias.copy()
    layer.update_params(0.01)
    np.testing.assert_allclose(layer.weight, kept[0] - 0.01 * step[0], rtol=1e-12)
    np.testing.assert_allclose(layer.bias, kept[1] - 0.01 * step[1], rtol=1e-12)
    np.testing.assert_array_equal(weight, kept[0])
    np.testing.assert_array_equal(bias, kept[1])
    assert (layer.forward(inputs)**2).sum() < (outputs**2).sum()


def test_what_fully_connected_backward_was_given_is_settled_when_it_returns():
    """Later passes, of any batch, and writes into the arrays change no gradient of the parameters."""
    layer, inputs = connection((3, 20, 7))
    out_grad = numbers(3, 7, seed=2)
    expected = textbook.fully_connect_grad(out_grad, inputs, np.zeros((7, 20)), np.zeros(7))
    given, grads = inputs.copy(), out_grad.copy()
    layer.forward(given)
    given[:] = 9
    layer.backward(grads)
    grads[:] = 9
    layer.forward(numbers(64, 20))
    np.testing.assert_array_equal(layer.grad_weight, expected[0])
    np.testing.assert_array_equal(layer.grad_bias, expected[1])


# ---------------------------------------------------------------------------------------------- all of them

def make_layers():
    return [ConvolutionLayer(2, 5, 3, padding=1), ConvolutionLayer(2, 3, 2, stride=2), MaxPoolLayer(), ReluLayer(),
            FlattenLayer(), FullyConnectLayer(8, 5)]


@pytest.mark.parametrize('place', range(6))
def test_a_copy_of_a_layer_goes_on_as_the_layer_does(place):
    """By deepcopy and pickle, between forward and backward; and what forward returned may be written to."""
    layer = make_layers()[place]
    inputs = numbers(3, 8) if isinstance(layer, FullyConnectLayer) else numbers(2, 2, 6, 7)
    outputs = layer.forward(inputs)
    out_grad = numbers(*outputs.shape, seed=1)
    expected = layer.backward(out_grad).copy()
    layer.forward(inputs)[:] = -1
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer):
        np.testing.assert_array_equal(twin.backward(out_grad), expected)
        np.testing.assert_array_equal(twin.forward(inputs), outputs)


@pytest.mark.parametrize('make', [lambda: ConvolutionLayer(3, 2, 3), lambda: FullyConnectLayer(5, 3)])
def test_initial_weights_are_drawn_when_read_and_are_the_eager_ones(make):
    np.random.seed(7)
    untouched = np.random.get_state()[1].copy()
    layer = make()
    np.testing.assert_array_equal(np.random.get_state()[1], untouched)
    weight = layer.weight
    np.random.seed(7)
    np.testing.assert_array_equal(weight, np.random.normal(loc=0.0, scale=0.01, size=weight.shape))
    assert layer.weight is weight and not layer.bias.any()


def test_any_number_of_threads_gives_the_same_bits():
    layer, inputs, _ = convolution((2, 5, 9, 33, 37, 3, 1, 1), np.float32)
    connected, rows = connection((2, 1030, 9), np.float32)

    def results():
        outputs, connections = layer.forward(inputs), connected.forward(rows)
        return outputs, layer.backward(outputs.astype(np.float64)), connections, connected.backward(connections)

    wanted = results()
    threads = numba.get_num_threads()
    try:
        for fewer in range(1, threads):
            numba.set_num_threads(fewer)
            for found, expected in zip(results(), wanted):
                np.testing.assert_array_equal(found, expected)
    finally:
        numba.set_num_threads(threads)


def python(code, **environment):
    folder = os.path.dirname(os.path.abspath(__file__))
    path = os.pathsep.join([folder, os.path.dirname(folder)])
    done = subprocess.run([sys.executable, '-W', 'error', '-c', code], timeout=120, stderr=subprocess.PIPE,
                          env=dict(os.environ, PYTHONPATH=path, **environment))
    assert done.returncode == 0, done.stderr.decode()


def test_every_loop_runs_as_plain_python():
    """For a debugger; and with an index that no array has, it says so."""
    python('''
import numpy as np, textbook
from test_layers import *
for dtype in np.float32, np.float64:
    for case in (1, 3, 5, 6, 7, 3, 1, 1), (2, 2, 4, 5, 6, 2, 0, 2), (1, 2, 3, 7, 7, 3, 2, 4):
        layer, inputs, inputs_pad = convolution(case, dtype)
        outputs = layer.forward(inputs)
        assert np.allclose(outputs, convolved(layer, inputs_pad, outputs.shape, dtype), atol=1e-5)
        out_grad = numbers(*outputs.shape)
        assert np.allclose(layer.backward(out_grad), convolved_back(layer, out_grad, inputs, inputs_pad))
        test_pooling_is_the_formula((2, 3, 5, 6, 3, 2), dtype)
    test_relu((2, 3, 4, 5)); test_flatten(); test_fully_connected_is_the_formula_to_the_bit((3, 12, 5))
    test_fully_connected_step_goes_downhill_and_leaves_the_old_arrays()
''', NUMBA_DISABLE_JIT='1')


def test_importing_starts_nothing():
    """A process that imports the layers and then forks: its children compute."""
    python('''
import multiprocessing, threading, numpy as np
from layer import ConvolutionLayer
assert threading.active_count() == 1
def outputs(seed):
    return ConvolutionLayer(2, 3, 3).forward(np.random.RandomState(seed).randn(1, 2, 6, 6)).shape
with multiprocessing.get_context('fork').Pool(2) as pool:
    assert pool.map_async(outputs, [1, 2]).get(100) == [(1, 3, 4, 4)] * 2
''')
