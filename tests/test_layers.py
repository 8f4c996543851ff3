"""Each layer, forward and backward, against the formulas, against others' code and against numerical gradients."""
import numpy as np
import pytest
from scipy.signal import correlate

import textbook
from layer import ConvolutionLayer, FlattenLayer, FullyConnectLayer, MaxPoolLayer, ReluLayer

try:
    import torch
except ImportError:
    torch = None

forward_stage = pytest.mark.stage80
backward_stage = pytest.mark.stage100
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
    (0, 2, 3, 6, 6, 3, 1, 1),
    (1, 64, 31, 14, 15, 3, 1, 1),     # too few outputs for Winograd's way
]
# The same for layers that take Winograd's way, which rounds otherwise than the formula: odd and even sides, channels
# beyond the last group and the last block of groups, rows longer than a band, other paddings, hardly any tiles, and
# so many weights that a thread spreads its own, in parts.
MANY_CHANNELS = [(1, 32, 32, 20, 20, 3, 1, 1), (2, 65, 35, 21, 22, 3, 1, 1), (1, 64, 32, 27, 31, 3, 0, 1),
                 (3, 68, 34, 22, 25, 3, 2, 1), (1, 64, 33, 21, 530, 3, 1, 1), (1, 67, 32, 300, 21, 3, 3, 1),
                 (2, 130, 250, 16, 17, 3, 1, 1), (2, 260, 264, 16, 17, 3, 1, 1), (1, 32, 36, 14, 15, 3, 1, 1),
                 (2, 250, 130, 15, 14, 3, 1, 1), (1, 64, 32, 46, 41, 3, 9, 1), (1, 1100, 33, 22, 21, 3, 1, 1),
                 (1, 64, 32, 14, 1700, 3, 1, 1), (0, 32, 32, 20, 20, 3, 1, 1)]
# For those whose gradient alone takes it, as the first layer's does.
FEW_INPUTS = [(1, 3, 64, 40, 38, 3, 1, 1), (2, 1, 33, 15, 14, 3, 1, 1), (1, 13, 34, 22, 25, 3, 0, 1),
              (1, 31, 40, 20, 23, 3, 2, 1)]
# batch, channels, height, width, kernel_size, stride
POOLINGS = [(1, 1, 2, 2, 2, 2), (2, 3, 8, 6, 2, 2), (1, 2, 7, 9, 2, 2), (2, 2, 9, 9, 3, 2), (1, 3, 8, 40, 3, 1),
            (1, 2, 11, 10, 2, 3), (3, 1, 5, 5, 5, 5), (1, 4, 6, 6, 1, 1), (2, 3, 70, 50, 2, 2), (1, 2, 7, 1200, 3, 2),
            (0, 2, 4, 4, 2, 2)]
# batch, in_features, out_features
CONNECTIONS = [(1, 1, 1), (1, 7, 4), (3, 512, 9), (2, 1023, 6), (5, 1100, 13), (8, 40, 5), (2, 16389, 5), (0, 6, 3)]


def numbers(*shape, **kind):
    """Random numbers, a different but fixed set for every shape."""
    seed = sum(size * 31**place for place, size in enumerate(shape)) + kind.get('seed', 0)
    return np.random.RandomState(seed % 2**32).randn(*shape).astype(kind.get('dtype', np.float64))


def convolution(case, dtype=np.float64):
    """A layer with random parameters, an input, and that input padded."""
    batch, in_channels, out_channels, height, width, kernel_size, padding, stride = case
    layer = ConvolutionLayer(in_channels, out_channels, kernel_size, padding, stride)
    layer.load_params(numbers(out_channels, in_channels, kernel_size, kernel_size, dtype=dtype),
                      numbers(out_channels, dtype=dtype))
    inputs = numbers(batch, in_channels, height, width, dtype=dtype)
    frame = ((0, 0), (0, 0), (padding, padding), (padding, padding))
    return layer, inputs, np.pad(inputs, frame, mode='constant')


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


def assert_same_twice(backward, out_grad):
    np.testing.assert_array_equal(backward(out_grad), backward(out_grad))


# ----------------------------------------------------------------------------------------------- convolution

@forward_stage
@pytest.mark.parametrize('dtype', [np.float32, np.float64])
@pytest.mark.parametrize('case', CONVOLUTIONS + FEW_INPUTS)
def test_convolution_is_the_formula_to_the_bit(case, dtype):
    layer, inputs, inputs_pad = convolution(case, dtype)
    outputs = layer.forward(inputs)
    expected = textbook.conv(inputs_pad, np.zeros_like(outputs), layer.weight, layer.bias, layer.kernel_size,
                             layer.stride)
    assert outputs.dtype == dtype
    np.testing.assert_array_equal(outputs, expected)


@backward_stage
@pytest.mark.parametrize('case', CONVOLUTIONS)
def test_convolution_gradient_is_the_formula_to_the_bit(case):
    layer, inputs, inputs_pad = convolution(case)
    out_grad = numbers(*layer.forward(inputs).shape, seed=1)
    in_grad = layer.backward(out_grad)
    P, (height, width) = layer.padding, inputs.shape[2:]
    expected = textbook.conv_back(out_grad, np.zeros(inputs_pad.shape), layer.weight, layer.kernel_size, layer.stride)
    assert in_grad.dtype == np.float64
    np.testing.assert_array_equal(in_grad, expected[:, :, P:P + height, P:P + width])


@backward_stage
@pytest.mark.parametrize('kernel_size, stride', [(1, 1), (1, 2), (3, 1)])
def test_convolution_gradient_is_the_same_of_any_array(kernel_size, stride):
    """Of float32 numbers and of an array that must not be written to, also where it is read without a copy."""
    layer = ConvolutionLayer(3, 5, kernel_size, stride=stride)
    single = numbers(*layer.forward(numbers(2, 3, 9, 9)).shape, seed=1).astype(np.float32)
    double = single.astype(np.float64)
    expected = layer.backward(double.copy())
    double.flags.writeable = False
    np.testing.assert_array_equal(layer.backward(single), expected)
    np.testing.assert_array_equal(layer.backward(double), expected)


@backward_stage
@pytest.mark.parametrize('kernel_size, stride', [(1, 1), (3, 1), (1, 2), (2, 3), (3, 2)])
def test_pixels_that_no_window_reads_have_no_gradient(kernel_size, stride):
    """Whatever was in the memory that theirs is written to."""
    weight, out_grad = numbers(3, 2, kernel_size, kernel_size), numbers(2, 3, 20, 20)
    side = 19 * stride + kernel_size + 2
    expected = textbook.conv_back(out_grad, np.zeros((2, 2, side, side)), weight, kernel_size, stride)
    np.full(expected.shape, np.nan)    # at once given back, to be handed out again
    in_grad = ConvolutionLayer._conv_back(out_grad, np.zeros(expected.shape), weight, kernel_size, stride)
    np.testing.assert_array_equal(in_grad, expected)


@backward_stage
@pytest.mark.parametrize('height, width, kernel_size, stride, padding', [
    (6, 1500, 1, 3, 2), (6, 1500, 2, 3, 0), (9, 8, 3, 5, 1),    # rows longer than a piece; the last ones unread
    (1, 1, 1, 7, 5), (2, 3, 2, 9, 4)])                          # all windows in the padding
def test_pixels_between_windows_and_past_the_last_have_no_gradient(height, width, kernel_size, stride, padding):
    layer, P = ConvolutionLayer(2, 3, kernel_size, padding, stride), padding
    out_grad = numbers(*layer.forward(numbers(2, 2, height, width)).shape, seed=1)
    expected = textbook.conv_back(out_grad, np.zeros((2, 2, height + 2 * P, width + 2 * P)), layer.weight, kernel_size,
                                  stride)[:, :, P:P + height, P:P + width]
    np.full(expected.shape, np.nan)    # as above
    np.testing.assert_array_equal(layer.backward(out_grad), expected)


@forward_stage
@pytest.mark.parametrize('dtype', [np.float32, np.float64])
@pytest.mark.parametrize('case', MANY_CHANNELS)
def test_convolution_of_many_channels_is_the_formula(case, dtype):
    """As near to the exact numbers as the formula's loops are, and not the same bits: it really took the other way.

    In float32 from 64 channels on: fewer would leave larger errors than the formula's.
    """
    layer, inputs, inputs_pad = convolution(case, dtype)
    outputs = layer.forward(inputs)
    weight, bias = layer.weight.astype(np.float64), layer.bias.astype(np.float64)
    exact = textbook.conv(inputs_pad.astype(np.float64), np.zeros(outputs.shape), weight, bias, 3, 1)
    assert outputs.dtype == dtype
    if dtype == np.float32:
        plain = textbook.conv(inputs_pad, np.zeros_like(outputs), layer.weight, layer.bias, 3, 1)
        assert np.square(outputs - exact).sum() <= np.square(plain - exact).sum()
        assert len(inputs) == 0 or (outputs != plain).any() == (layer.in_channels >= 64)
    else:
        np.testing.assert_allclose(outputs, exact, rtol=1e-11, atol=1e-12)
    assert len(inputs) == 0 or (outputs != exact).any()


@backward_stage
@pytest.mark.parametrize('channels, same', [(2850, False), (4097, False), (4098, True)])
def test_more_channels_than_there_is_room_for_keep_the_order_of_the_formula(channels, same):
    """Planes of some bands of the few tiles that so many channels leave room for."""
    layer, inputs, inputs_pad = convolution((1, channels, 32, 14, 18, 3, 1, 1))
    outputs = layer.forward(inputs)
    expected = textbook.conv(inputs_pad, np.zeros_like(outputs), layer.weight, layer.bias, 3, 1)
    np.testing.assert_allclose(outputs, expected, rtol=1e-10, atol=1e-10)
    assert (outputs == expected).all() == same
    layer, inputs, inputs_pad = convolution((1, 32, channels, 14, 18, 3, 1, 1))
    out_grad = numbers(*layer.forward(inputs).shape, seed=1)
    expected = textbook.conv_back(out_grad, np.zeros_like(inputs_pad), layer.weight, 3, 1)[:, :, 1:-1, 1:-1]
    in_grad = layer.backward(out_grad)
    np.testing.assert_allclose(in_grad, expected, rtol=1e-10, atol=1e-10)
    assert (in_grad == expected).all() == same


@backward_stage
@pytest.mark.parametrize('case', MANY_CHANNELS + FEW_INPUTS)
def test_convolution_gradient_of_many_channels_is_the_formula(case):
    """Added to what is there, as the formula adds it; and by itself, where the layer leaves out the frame."""
    layer, inputs, inputs_pad = convolution(case)
    out_grad = numbers(*layer.forward(inputs).shape, seed=1)
    there = numbers(*inputs_pad.shape, seed=2)
    expected = textbook.conv_back(out_grad, there.copy(), layer.weight, 3, 1)
    in_grad = ConvolutionLayer._conv_back(out_grad, there.copy(), layer.weight, 3, 1)
    np.testing.assert_allclose(in_grad, expected, rtol=1e-11, atol=1e-12)
    assert len(inputs) == 0 or (in_grad != expected).any()
    expected = textbook.conv_back(out_grad, np.zeros_like(there), layer.weight, 3, 1)
    P, (height, width) = layer.padding, inputs.shape[2:]
    in_grad, expected = layer.backward(out_grad), expected[:, :, P:P + height, P:P + width]
    np.testing.assert_allclose(in_grad, expected, rtol=1e-11, atol=1e-12)
    assert len(inputs) == 0 or (in_grad != expected).any()


@backward_stage
def test_convolution_gradient_of_many_channels_in_float32_is_the_formula_to_the_bit():
    """Whoever asks for float32 gets the formula's order: tiles of 4x4 outputs would be too coarse."""
    layer, inputs, inputs_pad = convolution(MANY_CHANNELS[0], np.float32)
    out_grad = numbers(1, layer.out_channels, *inputs.shape[2:], dtype=np.float32)
    in_grad = ConvolutionLayer._conv_back(out_grad, np.zeros_like(inputs_pad), layer.weight, 3, 1)
    expected = textbook.conv_back(out_grad, np.zeros_like(inputs_pad), layer.weight, 3, 1)
    assert in_grad.dtype == np.float32
    np.testing.assert_array_equal(in_grad, expected)


@forward_stage
@pytest.mark.parametrize('case', CONVOLUTIONS + MANY_CHANNELS)
def test_convolution_is_scipys(case):
    layer, inputs, inputs_pad = convolution(case)
    S = layer.stride
    expected = [[layer.bias[c] + correlate(picture, layer.weight[c], mode='valid')[0, ::S, ::S]
                 for c in range(layer.out_channels)] for picture in inputs_pad]
    outputs = layer.forward(inputs)
    np.testing.assert_allclose(outputs, np.reshape(expected, outputs.shape), rtol=1e-9, atol=1e-9)


@needs_torch
@backward_stage
@pytest.mark.parametrize('case', CONVOLUTIONS + MANY_CHANNELS + FEW_INPUTS)
def test_convolution_and_gradient_are_torchs(case):
    layer, inputs, _ = convolution(case)
    x = torch.tensor(inputs, requires_grad=True)
    y = torch.nn.functional.conv2d(x, torch.tensor(layer.weight), torch.tensor(layer.bias), layer.stride,
                                   layer.padding)
    np.testing.assert_allclose(layer.forward(inputs), y.detach().numpy(), rtol=1e-9, atol=1e-9)
    out_grad = numbers(*y.shape, seed=2)
    y.backward(torch.tensor(out_grad))
    np.testing.assert_allclose(layer.backward(out_grad), x.grad.numpy(), rtol=1e-9, atol=1e-9)


@backward_stage
@pytest.mark.parametrize('case', [case for case in CONVOLUTIONS + MANY_CHANNELS + FEW_INPUTS
                                  if case[0] and max(case[3:5]) < 100])
def test_convolution_gradient_is_the_slope(case):
    layer, inputs, _ = convolution(case)
    out_grad = numbers(*layer.forward(inputs).shape, seed=3)
    gradient = layer.backward(out_grad)
    assert_same_twice(layer.backward, out_grad)
    assert_numerical_gradient(layer.forward, inputs, out_grad, gradient)


@forward_stage
@pytest.mark.parametrize('channels', [1, 3, 4, 5, 7, 8, 9, 17])
def test_convolution_at_every_block_boundary(channels):
    for width in range(1, 41):
        layer, inputs, inputs_pad = convolution((1, channels, channels, 3, width, 3, 1, 1), np.float32)
        outputs = layer.forward(inputs)
        expected = textbook.conv(inputs_pad, np.zeros_like(outputs), layer.weight, layer.bias, 3, 1)
        np.testing.assert_array_equal(outputs, expected, err_msg='width %d' % width)
        out_grad = numbers(*outputs.shape)
        expected = textbook.conv_back(out_grad, np.zeros(inputs_pad.shape), layer.weight, 3, 1)[:, :, 1:-1, 1:-1]
        np.testing.assert_array_equal(layer.backward(out_grad), expected, err_msg='width %d' % width)


@backward_stage
def test_convolution_and_pooling_of_random_shapes():
    rng = np.random.RandomState(20)
    for trial in range(150):
        kernel_size, padding, stride = rng.randint(1, 6), rng.randint(0, 4), rng.randint(1, 5)
        least = max(1, kernel_size - 2 * padding)
        case = (rng.randint(0, 4), rng.randint(1, 10), rng.randint(1, 10), rng.randint(least, 25),
                rng.randint(least, 60), kernel_size, padding, stride)
        layer, inputs, inputs_pad = convolution(case, (np.float32, np.float64)[trial % 2])
        outputs = layer.forward(inputs)
        expected = textbook.conv(inputs_pad, np.zeros_like(outputs), layer.weight, layer.bias, kernel_size, stride)
        np.testing.assert_array_equal(outputs, expected, err_msg=str(case))
        out_grad = numbers(*outputs.shape, seed=trial)
        expected = textbook.conv_back(out_grad, np.zeros(inputs_pad.shape), layer.weight, kernel_size, stride)
        expected = expected[:, :, padding:padding + case[3], padding:padding + case[4]]
        np.testing.assert_array_equal(layer.backward(out_grad), expected, err_msg=str(case))

        pool = MaxPoolLayer(kernel_size, stride)
        if min(case[3:5]) >= kernel_size:
            pooled = pool.forward(np.round(inputs))
            expected = textbook.pool(np.zeros_like(pooled), np.round(inputs), np.zeros(pooled.shape, np.int32),
                                     kernel_size, stride)
            np.testing.assert_array_equal(pooled, expected[0], err_msg=str(case))
            np.testing.assert_array_equal(pool.argidx, expected[1], err_msg=str(case))


@forward_stage
@pytest.mark.parametrize('positive', [False, True])
@pytest.mark.parametrize('case', [(1, 64, 64, 30, 30, 3, 1, 1), (1, 100, 32, 30, 31, 3, 1, 1),
                                  (1, 256, 32, 56, 56, 3, 1, 1), (1, 512, 40, 14, 14, 3, 1, 1)])
def test_convolution_errs_no_more_than_the_formula(case, positive):
    """Also behind a ReLU, where nothing is negative."""
    layer, inputs, inputs_pad = convolution(case, np.float32)
    if positive:
        inputs, inputs_pad = np.abs(inputs), np.abs(inputs_pad)
    outputs = layer.forward(inputs)
    plain = textbook.conv(inputs_pad, np.zeros_like(outputs), layer.weight, layer.bias, 3, 1)
    exact = textbook.conv(inputs_pad.astype(np.float64), np.zeros(outputs.shape), layer.weight.astype(np.float64),
                          layer.bias.astype(np.float64), 3, 1)
    assert 0 < np.abs(outputs - exact).max() <= np.abs(plain - exact).max()
    assert np.square(outputs - exact).mean() <= np.square(plain - exact).mean()


@forward_stage
def test_static_methods_can_be_called_as_the_handbook_does():
    layer, _, inputs_pad = convolution((2, 3, 5, 9, 8, 3, 1, 2))
    outputs = np.zeros((2, 5, 5, 4))
    expected = textbook.conv(inputs_pad, outputs.copy(), layer.weight, layer.bias, 3, 2)
    np.testing.assert_array_equal(ConvolutionLayer._conv(inputs_pad, outputs, layer.weight, layer.bias, 3, 2), expected)
    in_grad = np.zeros(inputs_pad.shape)
    expected = textbook.conv_back(outputs, in_grad.copy(), layer.weight, 3, 2)
    np.testing.assert_array_equal(ConvolutionLayer._conv_back(outputs, in_grad, layer.weight, 3, 2), expected)
    there = numbers(*inputs_pad.shape, seed=1)    # it adds to what is there, as the formula does
    in_grad = ConvolutionLayer._conv_back(outputs, there.copy(), layer.weight, 3, 2)
    np.testing.assert_allclose(in_grad, there + expected, rtol=1e-12, atol=1e-12)


@backward_stage
@pytest.mark.parametrize('case', [(2, 3, 5, 9, 8, 3, 1, 2), (1, 32, 32, 20, 20, 3, 1, 1)])
def test_static_methods_take_arrays_that_are_not_contiguous(case):
    layer, _, inputs_pad = convolution(case)
    out = layer.forward(numbers(*case[:2] + case[3:5]))
    results = []
    for order in 'CF':
        outputs = ConvolutionLayer._conv(np.asarray(inputs_pad, order=order), np.zeros_like(out), layer.weight,
                                         layer.bias, 3, layer.stride)
        in_grad = ConvolutionLayer._conv_back(np.asarray(out, order=order), np.zeros(inputs_pad.shape), layer.weight, 3,
                                              layer.stride)
        results.append((outputs, in_grad))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])


# ------------------------------------------------------------------------------------------------- pooling

def pooling(case):
    batch, channels, height, width, kernel_size, stride = case
    return MaxPoolLayer(kernel_size, stride), numbers(batch, channels, height, width)


@forward_stage
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


@forward_stage
def test_static_pooling_takes_inputs_that_are_not_contiguous():
    layer, inputs = pooling((2, 3, 7, 6, 3, 2))
    expected = layer.forward(inputs)
    outputs, argidx = MaxPoolLayer._pool(np.zeros_like(expected), np.asarray(inputs, order='F'),
                                         np.zeros(expected.shape, np.int32), 3, 2)
    np.testing.assert_array_equal(outputs, expected)
    np.testing.assert_array_equal(argidx, layer.argidx)


@backward_stage
@pytest.mark.parametrize('case', POOLINGS)
def test_pooling_gradient_is_the_formula(case):
    layer, inputs = pooling(case)
    out_grad = numbers(*layer.forward(np.round(inputs)).shape, seed=1)
    expected = textbook.pool_back(out_grad, np.zeros(inputs.shape), layer.argidx, layer.kernel_size, layer.stride)
    in_grad = layer.backward(out_grad)
    assert in_grad.dtype == np.float64
    np.testing.assert_array_equal(in_grad, expected)
    assert_same_twice(layer.backward, out_grad)


@backward_stage
@pytest.mark.parametrize('case', [case for case in POOLINGS if case[0]])
def test_pooling_gradient_is_the_slope(case):
    layer, inputs = pooling(case)
    # a shuffled ladder: no two numbers are closer than the steps of the test
    inputs = np.random.RandomState(5).permutation(inputs.size).reshape(inputs.shape) * 0.1
    out_grad = numbers(*layer.forward(inputs).shape, seed=2)
    gradient = layer.backward(out_grad)
    assert_numerical_gradient(layer.forward, inputs, out_grad, gradient)


@needs_torch
@backward_stage
@pytest.mark.parametrize('case', [case for case in POOLINGS if case[0]])
def test_pooling_and_gradient_are_torchs(case):
    layer, inputs = pooling(case)
    x = torch.tensor(inputs, requires_grad=True)
    y = torch.nn.functional.max_pool2d(x, layer.kernel_size, layer.stride)
    np.testing.assert_array_equal(layer.forward(inputs), y.detach().numpy())
    out_grad = numbers(*y.shape, seed=2)
    y.backward(torch.tensor(out_grad))
    np.testing.assert_allclose(layer.backward(out_grad), x.grad.numpy(), rtol=1e-12, atol=1e-12)


@forward_stage
@pytest.mark.parametrize('case', [case for case in POOLINGS if case[0]])
def test_pooling_is_np_max(case):
    layer, inputs = pooling(case)
    outputs, K, S = layer.forward(inputs), layer.kernel_size, layer.stride
    for h in range(outputs.shape[2]):
        for w in range(outputs.shape[3]):
            window = inputs[:, :, h * S:h * S + K, w * S:w * S + K]
            np.testing.assert_array_equal(outputs[:, :, h, w], window.max(axis=(2, 3)))


@forward_stage
def test_pooling_takes_a_nan_as_np_max_does():
    inputs = numbers(1, 2, 6, 8)
    inputs[0, 0, 1, 1] = inputs[0, 0, 0, 2] = inputs[0, 1, 0, 0] = np.nan
    inputs[0, 1, 3, 3], inputs[0, 1, 4:, :2] = np.inf, -np.inf
    outputs = MaxPoolLayer().forward(inputs)
    np.testing.assert_array_equal(outputs, inputs.reshape(1, 2, 3, 2, 4, 2).max(axis=(3, 5)))


@backward_stage
def test_overlapping_windows_add_their_gradients():
    inputs = np.zeros((1, 1, 3, 3))
    inputs[0, 0, 1, 1] = 1    # the maximum of all four windows
    layer = MaxPoolLayer(kernel_size=2, stride=1)
    layer.forward(inputs)
    np.testing.assert_array_equal(layer.backward(np.array([[[[1., 2.], [4., 8.]]]])), 15 * inputs)


# ------------------------------------------------------------------------------------ relu, flatten, connect

@forward_stage
@pytest.mark.parametrize('shape', [(3,), (2, 5), (2, 3, 4, 5), (0, 4)])
def test_relu_forward(shape):
    inputs = numbers(*shape, dtype=np.float32)
    outputs = ReluLayer().forward(inputs)
    assert outputs.dtype == np.float32
    np.testing.assert_array_equal(outputs, np.maximum(inputs, 0))


@backward_stage
def test_relu_gradient_passes_where_the_input_was_positive():
    inputs = np.array([[-1., 0., 2., np.nan, np.inf, -np.inf]])
    layer = ReluLayer()
    np.testing.assert_array_equal(layer.forward(inputs), [[0, 0, 2, np.nan, np.inf, 0]])
    np.testing.assert_array_equal(layer.backward(np.full((1, 6), 3.)), [[0, 0, 3, 0, 3, 0]])


@forward_stage
def test_flatten_forward():
    inputs = numbers(2, 3, 4, 5, dtype=np.float32)
    np.testing.assert_array_equal(FlattenLayer().forward(inputs), inputs.reshape(2, 60))


@backward_stage
def test_flatten_gradient():
    layer, out_grad = FlattenLayer(), numbers(2, 60)
    layer.forward(numbers(2, 3, 4, 5))
    np.testing.assert_array_equal(layer.backward(out_grad), out_grad.reshape(2, 3, 4, 5))


@forward_stage
@pytest.mark.parametrize('case', CONNECTIONS)
def test_fully_connected_is_the_formula(case):
    layer, inputs = connection(case)
    outputs = layer.forward(inputs)
    np.testing.assert_allclose(outputs, textbook.fully_connect(inputs, np.zeros_like(outputs), layer.weight,
                                                               layer.bias), rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(outputs, inputs @ layer.weight.T + layer.bias, rtol=1e-11, atol=1e-11)


@forward_stage
def test_fully_connected_errs_less_than_the_formula():
    layer, inputs = connection((2, 25088, 3), np.float32)
    outputs = layer.forward(inputs)
    assert outputs.dtype == np.float32
    plain = textbook.fully_connect(inputs, np.zeros_like(outputs), layer.weight, layer.bias)
    exact = inputs.astype(np.float64) @ layer.weight.astype(np.float64).T + layer.bias
    assert 0 < np.abs(outputs - exact).max() <= np.abs(plain - exact).max()


@backward_stage
@pytest.mark.parametrize('case', CONNECTIONS)
def test_fully_connected_gradients_are_the_formulas(case):
    layer, inputs = connection(case)
    out_grad = numbers(*layer.forward(inputs).shape, seed=1)
    in_grad = layer.backward(out_grad)
    np.testing.assert_allclose(in_grad, textbook.fully_connect_back(out_grad, np.zeros_like(inputs), layer.weight),
                               rtol=1e-11, atol=1e-11)
    expected = textbook.fully_connect_grad(out_grad, inputs, np.zeros(layer.weight.shape), np.zeros(layer.bias.shape))
    np.testing.assert_allclose(layer.grad_weight, expected[0], rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(layer.grad_bias, expected[1], rtol=1e-11, atol=1e-11)
    assert_same_twice(layer.backward, out_grad)


@backward_stage
@pytest.mark.parametrize('case', CONNECTIONS)
def test_fully_connected_gradient_behind_a_relu_is_the_formulas(case):
    """Rows that meet only zeros are not read, but one of them may meet another number in another picture."""
    layer, inputs = connection(case)
    out_grad = np.maximum(numbers(*layer.forward(inputs).shape, seed=1), 0)
    out_grad[:, ::3] = 0
    expected = textbook.fully_connect_back(out_grad, np.zeros_like(inputs), layer.weight)
    np.testing.assert_allclose(layer.backward(out_grad), expected, rtol=1e-11, atol=1e-11)
    for nowhere in (0, np.nan):    # a NaN is no zero
        out_grad[:] = nowhere
        expected = textbook.fully_connect_back(out_grad, np.zeros_like(inputs), layer.weight)
        np.testing.assert_array_equal(layer.backward(out_grad), expected)


@backward_stage
def test_fully_connected_gradient_is_the_slope():
    layer, inputs = connection((3, 20, 7))
    out_grad = numbers(3, 7, seed=2)
    layer.forward(inputs)
    assert_numerical_gradient(layer.forward, inputs, out_grad, layer.backward(out_grad))

    def with_weight(weight):
        layer.weight = weight
        return layer.forward(inputs)
    assert_numerical_gradient(with_weight, layer.weight, out_grad, layer.grad_weight)


@backward_stage
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


@forward_stage
@pytest.mark.parametrize('make', [lambda: ConvolutionLayer(3, 2, 3), lambda: FullyConnectLayer(5, 3)])
def test_initial_weights_are_drawn_when_read_and_are_the_eager_ones(make):
    np.random.seed(7)
    layer = make()
    untouched = np.random.get_state()[1].copy()
    np.random.seed(7)
    np.testing.assert_array_equal(np.random.get_state()[1], untouched)
    expected = np.random.normal(loc=0.0, scale=0.01, size=layer.weight_shape)
    np.random.seed(7)
    np.testing.assert_array_equal(layer.weight, expected)
    assert layer.weight is layer.weight and not layer.bias.any()
