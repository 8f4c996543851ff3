"""What the layers and the loss do with unusual arrays and with wrong calls."""
import numpy as np
import pytest

from layer import ConvolutionLayer, FlattenLayer, FullyConnectLayer, MaxPoolLayer, ReluLayer
from loss import CrossEntropy
from test_layers import numbers

LAYERS = [
    (lambda: ConvolutionLayer(2, 5, 3, padding=1), (2, 2, 6, 7)),
    (lambda: ConvolutionLayer(2, 3, 2, stride=2), (2, 2, 6, 7)),
    (lambda: MaxPoolLayer(), (2, 2, 6, 7)),
    (lambda: ReluLayer(), (2, 2, 6, 7)),
    (lambda: FlattenLayer(), (2, 2, 6, 7)),
    (lambda: FullyConnectLayer(12, 5), (3, 12)),
]


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
    np.random.seed(3)
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
            layer.load_params(unusual(layer.weight), unusual(layer.bias))
            np.testing.assert_array_equal(layer.forward(inputs), outputs)


@pytest.mark.parametrize('make, shape', LAYERS)
@pytest.mark.parametrize('dtype', [np.int64, np.complex128, np.bool_, np.float16])
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
    with pytest.raises(ValueError, match='out_grad'):
        layer.backward(np.zeros(outputs.shape[:-1] + (outputs.shape[-1] + 1,)))


@pytest.mark.parametrize('call, words', [
    (lambda: ConvolutionLayer(0, 4, 3), 'in_channels'),
    (lambda: ConvolutionLayer(3, 4, 3, stride=0), 'stride'),
    (lambda: ConvolutionLayer(3, 4, 3, padding=-1), 'padding'),
    (lambda: ConvolutionLayer(3, 4, 2.5), 'kernel_size'),
    (lambda: MaxPoolLayer(0), 'kernel_size'),
    (lambda: MaxPoolLayer(2, 0), 'stride'),
    (lambda: FullyConnectLayer(3, 0), 'out_features'),
    (lambda: ConvolutionLayer(3, 4, 3).forward(numbers(1, 2, 5, 5)), '3 channels'),
    (lambda: ConvolutionLayer(3, 4, 3).forward(numbers(3, 5, 5)), '4 dimensions'),
    (lambda: ConvolutionLayer(3, 4, 7, padding=1).forward(numbers(1, 3, 4, 9)), 'kernel of 7'),
    (lambda: MaxPoolLayer(5).forward(numbers(1, 3, 4, 9)), 'kernel of 5'),
    (lambda: FullyConnectLayer(3, 4).forward(numbers(1, 4)), '3 features'),
])
def test_wrong_sizes_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize('layer', [ConvolutionLayer(2, 3, 3), FullyConnectLayer(4, 3)])
def test_load_params_asserts_both_shapes(layer):
    with pytest.raises(AssertionError, match='weight'):
        layer.load_params(np.zeros((3, 3)), np.zeros(3))
    with pytest.raises(AssertionError, match='bias'):
        layer.load_params(np.zeros(layer.weight_shape), np.zeros(4))


@pytest.mark.parametrize('labels, error', [
    ([0, 4], ValueError), ([-1, 0], ValueError), ([0], ValueError), ([[0, 1]], ValueError), ([0., 1.], TypeError)])
def test_wrong_labels_are_refused(labels, error):
    with pytest.raises(error, match='labels'):
        CrossEntropy().forward(numbers(2, 4), np.array(labels))
