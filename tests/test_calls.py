"""What the layers and the loss do with unusual arrays and with wrong calls."""
import numpy as np
import pytest

from layer import ConvolutionLayer, FlattenLayer, FullyConnectLayer, MaxPoolLayer, ReluLayer

LAYERS = [
    (lambda: ConvolutionLayer(2, 5, 3, padding=1), (2, 2, 6, 7)),
    (lambda: MaxPoolLayer(), (2, 2, 6, 7)),
    (lambda: ReluLayer(), (2, 2, 6, 7)),
    (lambda: FlattenLayer(), (2, 2, 6, 7)),
    (lambda: FullyConnectLayer(12, 5), (3, 12)),
]


def numbers(*shape, **kind):
    """Random numbers, a different but fixed set for every shape."""
    seed = sum(size * 31**place for place, size in enumerate(shape)) + kind.get('seed', 0)
    return np.asarray(np.random.RandomState(seed % 2**32).randn(*shape)).astype(kind.get('dtype', np.float64))


@pytest.mark.parametrize('make, shape', LAYERS)
def test_no_array_that_was_given_is_changed(make, shape):
    layer, inputs = make(), numbers(*shape)
    kept = inputs.copy()
    outputs = layer.forward(inputs)
    np.testing.assert_array_equal(inputs, kept)
    out_grad = numbers(*outputs.shape, seed=1)
    kept = out_grad.copy(), outputs.copy()
    layer.backward(out_grad)
    np.testing.assert_array_equal(out_grad, kept[0])
    np.testing.assert_array_equal(outputs, kept[1])


@pytest.mark.parametrize('make, shape', LAYERS)
def test_strided_reversed_and_read_only_arrays(make, shape):
    layer, inputs = make(), numbers(*shape)
    outputs = layer.forward(inputs)
    out_grad = numbers(*outputs.shape, seed=1)
    in_grad = layer.backward(out_grad)

    def read_only(array):
        array = array.copy()
        array.flags.writeable = False
        return array

    def strided(array):
        wide = np.zeros(array.shape[:-1] + (2 * array.shape[-1],))
        wide[..., ::2] = array
        return wide[..., ::2]

    def backwards(array):
        return array[..., ::-1].copy()[..., ::-1]

    for unusual in (read_only, strided, backwards, np.asfortranarray):
        np.testing.assert_array_equal(layer.forward(unusual(inputs)), outputs)
        np.testing.assert_array_equal(layer.backward(unusual(out_grad)), in_grad)
    if hasattr(layer, 'weight'):
        layer.load_params(strided(layer.weight), strided(layer.bias))
        np.testing.assert_array_equal(layer.forward(inputs), outputs)
        np.testing.assert_array_equal(layer.backward(out_grad), in_grad)


@pytest.mark.parametrize('make, shape', LAYERS)
@pytest.mark.parametrize('dtype', [np.int64, np.complex128, np.bool_, np.float16, '>f4', object])
def test_other_numbers_are_refused(make, shape, dtype):
    with pytest.raises(TypeError, match='inputs'):
        make().forward(np.ones(shape, dtype=dtype))


@pytest.mark.parametrize('make, shape', LAYERS)
def test_backward_needs_a_forward(make, shape):
    with pytest.raises(RuntimeError, match='forward'):
        make().backward(numbers(*shape))


@pytest.mark.parametrize('make, shape', LAYERS)
def test_a_gradient_of_another_shape_is_refused(make, shape):
    layer = make()
    outputs = layer.forward(numbers(*shape))
    with pytest.raises(ValueError, match='grad'):
        layer.backward(np.zeros(outputs.shape[:-1] + (outputs.shape[-1] + 1,)))


@pytest.mark.parametrize('call, words', [
    (lambda: ConvolutionLayer(0, 4, 3), 'in_channels'),
    (lambda: ConvolutionLayer(3, 4, 3, stride=0), 'stride'),
    (lambda: ConvolutionLayer(3, 4, 3, padding=-1), 'padding'),
    (lambda: MaxPoolLayer(0), 'kernel_size'),
    (lambda: MaxPoolLayer(2, 0), 'stride'),
    (lambda: FullyConnectLayer(3, 0), 'out_features'),
    (lambda: ConvolutionLayer(3, 4, 3).forward(numbers(1, 2, 5, 5)), r'inputs: shape \(any, 3, any, any\)'),
    (lambda: ConvolutionLayer(3, 4, 3).forward(numbers(3, 5, 5)), r'inputs: shape \(any, 3, any, any\)'),
    (lambda: ConvolutionLayer(3, 4, 7, padding=1).forward(numbers(1, 3, 4, 9)), 'window of 7'),
    (lambda: MaxPoolLayer(5).forward(numbers(1, 3, 4, 9)), 'window of 5'),
    (lambda: FullyConnectLayer(3, 4).forward(numbers(1, 4)), r'inputs: shape \(any, 3\)'),
])
def test_wrong_sizes_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize('size', [3.0, 2.5, None, (3, 3), '3'])
@pytest.mark.parametrize('name, make', [
    ('kernel_size', lambda size: ConvolutionLayer(3, 4, size)), ('padding', lambda size: ConvolutionLayer(3, 4, 3, size)),
    ('in_channels', lambda size: ConvolutionLayer(size, 4, 3)), ('stride', lambda size: MaxPoolLayer(2, size)),
    ('in_features', lambda size: FullyConnectLayer(size, 4))])
def test_sizes_that_are_no_whole_numbers_are_named(name, make, size):
    with pytest.raises(TypeError, match=name):
        make(size)


def test_numpys_whole_numbers_are_whole_numbers():
    layer = ConvolutionLayer(np.int32(3), np.int64(4), np.uint8(3), np.int16(1), np.int8(2))
    assert layer.forward(numbers(1, 3, 5, 5)).shape == (1, 4, 3, 3)


@pytest.mark.parametrize('layer', [ConvolutionLayer(2, 3, 3), FullyConnectLayer(4, 3)])
def test_load_params_asserts_both_shapes(layer):
    weight = layer.weight
    for parameters in ((np.zeros((3, 3)), np.zeros(3)), (weight, np.zeros(4))):
        with pytest.raises(AssertionError):
            layer.load_params(*parameters)


@pytest.mark.parametrize('dtype, kept', [
    (np.float32, np.float32), (np.float64, np.float64), (np.float16, np.float32), ('>f4', np.float32),
    ('>f8', np.float64), (np.int64, np.float64), (np.uint8, np.float64), (object, np.float64),
    (np.longdouble, np.float64)])
def test_parameters_of_other_kinds_train_as_what_holds_them_exactly(dtype, kept):
    layer = FullyConnectLayer(3, 2)
    weight = np.array([[45, 2, 3], [4, 5, 6]], dtype=dtype)
    layer.load_params(weight, np.zeros(2, dtype=dtype))
    assert layer.weight.dtype == layer.bias.dtype == kept and layer.weight.dtype.isnative
    np.testing.assert_array_equal(layer.forward(np.eye(3)), weight.T.astype(float))
    layer.backward(np.ones((3, 2)))
    layer.update_params(0.25)
    np.testing.assert_array_equal(layer.weight, weight.astype(float) - 0.25)


@pytest.mark.parametrize('weight', [
    np.full((2, 3), 2**53 + 1), np.full((2, 3), np.longdouble(1) / 3), np.full((2, 3), 1j), np.full((2, 3), 'a'),
    np.full((2, 3), None), np.ones((2, 3), bool)], ids=str)
def test_parameters_that_no_float_holds_are_refused_by_name(weight):
    with pytest.raises(TypeError, match='weight'):
        FullyConnectLayer(3, 2).load_params(weight, np.zeros(2))


CONV, CONV_BACK = ConvolutionLayer._conv, ConvolutionLayer._conv_back
POOL, POOL_BACK = MaxPoolLayer._pool, MaxPoolLayer._pool_back


def indices(*shape):
    return np.zeros(shape, np.int32)


@pytest.mark.parametrize('call', [
    lambda: CONV(numbers(1, 2, 6, 6), numbers(1, 3, 5, 4), numbers(3, 2, 3, 3), numbers(3), 3, 1),      # too tall
    lambda: CONV(numbers(1, 2, 6, 6), numbers(1, 3, 4, 4), numbers(3, 2, 3, 3), numbers(3), 3, 2),
    lambda: CONV(numbers(1, 2, 6, 6), numbers(2, 3, 4, 4), numbers(3, 2, 3, 3), numbers(3), 3, 1),      # batches
    lambda: CONV(numbers(1, 2, 6, 6), numbers(1, 3, 4, 4), numbers(4, 2, 3, 3), numbers(3), 3, 1),
    lambda: CONV(numbers(1, 2, 6, 6), numbers(1, 3, 4, 4), numbers(3, 1, 3, 3), numbers(3), 3, 1),
    lambda: CONV(numbers(1, 2, 6, 6), numbers(1, 3, 4, 4), numbers(3, 2, 3, 2), numbers(3), 3, 1),
    lambda: CONV(numbers(1, 2, 6, 6), numbers(1, 3, 4, 4), numbers(3, 2, 3, 3), numbers(2), 3, 1),      # bias
    lambda: CONV(numbers(1, 2, 6, 6), numbers(1, 3, 4, 4), numbers(3, 2, 3, 3), numbers(3), 3, 0),
    lambda: CONV_BACK(numbers(1, 3, 5, 4), numbers(1, 2, 6, 6), numbers(3, 2, 3, 3), 3, 1),
    lambda: CONV_BACK(numbers(2, 3, 4, 4), numbers(1, 2, 6, 6), numbers(3, 2, 3, 3), 3, 1),
    lambda: CONV_BACK(numbers(1, 3, 4, 4), numbers(1, 4, 6, 6), numbers(3, 2, 3, 3), 3, 1),
    lambda: POOL(numbers(1, 2, 4, 3), numbers(1, 2, 6, 6), indices(1, 2, 4, 3), 2, 2),
    lambda: POOL(numbers(1, 3, 3, 3), numbers(1, 2, 6, 6), indices(1, 3, 3, 3), 2, 2),
    lambda: POOL(numbers(1, 2, 3, 3), numbers(1, 2, 6, 6), indices(1, 2, 2, 3), 2, 2),
    lambda: POOL_BACK(numbers(1, 2, 3, 3), numbers(1, 2, 5, 6), indices(1, 2, 3, 3), 2, 2),
    lambda: POOL_BACK(numbers(1, 2, 3, 3), numbers(1, 2, 6, 6), indices(1, 2, 3, 3) + 4, 2, 2),
    lambda: POOL_BACK(numbers(1, 2, 3, 3), numbers(1, 2, 6, 6), indices(1, 2, 3, 3) - 1, 2, 2),
])
def test_static_methods_refuse_arrays_that_do_not_fit_each_other(call):
    with pytest.raises(ValueError):
        call()


def test_static_methods_take_what_fits():
    assert CONV(numbers(1, 2, 6, 6), numbers(1, 3, 4, 4), numbers(3, 2, 3, 3), numbers(3), 3, 1).shape == (1, 3, 4, 4)
    assert CONV_BACK(numbers(1, 3, 4, 4), numbers(1, 2, 6, 6), numbers(3, 2, 3, 3), 3, 1).shape == (1, 2, 6, 6)
    POOL(numbers(1, 2, 3, 3), numbers(1, 2, 6, 6), indices(1, 2, 3, 3), 2, 2)
    POOL_BACK(numbers(1, 2, 3, 3), numbers(1, 2, 6, 6), indices(1, 2, 3, 3) + 3, 2, 2)


def test_a_pass_that_was_refused_leaves_what_the_last_one_left():
    for layer in ConvolutionLayer(1, 1, 3), MaxPoolLayer(3, 1):
        outputs = layer.forward(numbers(1, 1, 5, 5))
        expected = layer.backward(outputs)
        with pytest.raises(ValueError):
            layer.forward(numbers(1, 1, 2, 2))
        np.testing.assert_array_equal(layer.backward(outputs), expected)


def test_parameters_are_loaded_both_or_none():
    for layer in ConvolutionLayer(1, 2, 3), FullyConnectLayer(4, 2):
        weight, bias = layer.weight, layer.bias
        with pytest.raises(TypeError, match='bias'):
            layer.load_params(np.zeros(weight.shape), np.array([1j, 2]))
        assert layer.weight is weight and layer.bias is bias


def test_a_stride_far_larger_than_the_window_costs_nothing():
    """Neither time nor memory grow with what lies between the windows."""
    layer = ConvolutionLayer(1, 1, 2, stride=10**5)
    layer.load_params(np.ones((1, 1, 2, 2)), np.zeros(1))
    assert layer.forward(np.ones((1, 1, 3, 3))) == 4
    np.testing.assert_array_equal(layer.backward(np.ones((1, 1, 1, 1)))[0, 0], [[1, 1, 0], [1, 1, 0], [0, 0, 0]])


def test_a_gradient_that_is_no_array_is_not_written_to():
    """What gives its memory for an array, as torch's tensors do."""
    class Tensor(object):
        def __init__(self, numbers):
            self.numbers = numbers

        def __array__(self, dtype=None, copy=None):
            return self.numbers

    for make, shape in LAYERS:
        layer = make()
        given = Tensor(numbers(*layer.forward(numbers(*shape)).shape))
        kept = given.numbers.copy()
        layer.backward(given)
        np.testing.assert_array_equal(given.numbers, kept)


def test_static_methods_refuse_a_weight_without_numbers():
    for call in (lambda: CONV(numbers(1, 0, 6, 6), numbers(1, 3, 4, 4), numbers(3, 0, 3, 3), numbers(3), 3, 1),
                 lambda: CONV(numbers(1, 2, 6, 6), numbers(1, 0, 4, 4), numbers(0, 2, 3, 3), numbers(0), 3, 1),
                 lambda: CONV_BACK(numbers(1, 3, 7, 7), numbers(1, 2, 6, 6), numbers(3, 2, 0, 0), 0, 1)):
        with pytest.raises(ValueError):
            call()
