"""What file/making/train.py adds to the layers: gradients of parameters, of mixed labels; a training that goes on."""
import os
import sys

import numpy as np
import pytest
from scipy.special import log_softmax

from conftest import PROJECT
from test_layers import assert_numerical_gradient, numbers

sys.path.insert(0, os.path.join(PROJECT, 'file', 'making'))
import train    # noqa: E402


def test_gradients_of_a_convolutions_parameters_are_the_slope():
    layer, inputs, out_grad = train.TrainedConvolution(3, 4, 3, padding=1), numbers(2, 3, 5, 6), numbers(2, 4, 5, 6, seed=1)
    weight, bias = numbers(4, 3, 3, 3, seed=2), numbers(4, seed=3)
    layer.load_params(weight, bias)
    layer.forward(inputs)
    layer.backward(out_grad)

    def forward(weight, bias):
        layer.load_params(weight, bias)
        return layer.forward(inputs)
    assert layer.grad_weight.dtype == layer.grad_bias.dtype == np.float32
    out_grad = out_grad.astype(np.float32).astype(float)    # what the layer computed with
    assert_numerical_gradient(lambda weight: forward(weight, bias), weight, out_grad, layer.grad_weight)
    assert_numerical_gradient(lambda bias: forward(weight, bias), bias, out_grad, layer.grad_bias)


def test_gradient_of_mixed_and_smoothed_labels_is_the_slope():
    """Without smoothing, of the loss that is printed; with it, of the cross-entropy against the smoothed labels."""
    logits, labels, others = numbers(3, 4), np.array([0, 3, 1]), np.array([1, 3, 2])

    def loss(logits):
        return np.array(train.loss_and_gradient(logits, labels, others, 0.7, 0)[0])
    assert_numerical_gradient(loss, logits, 1.0, train.loss_and_gradient(logits, labels, others, 0.7, 0)[1])
    one = np.eye(4)
    wanted = 0.8 * (0.7 * one[labels] + 0.3 * one[others]) + 0.2 / 4

    def cross_entropy(logits):
        return np.array(-(wanted * log_softmax(logits, axis=1)).sum() / 3)
    assert_numerical_gradient(cross_entropy, logits, 1.0,
                              train.loss_and_gradient(logits, labels, others, 0.7, 0.2)[1])


def test_a_view_is_a_part_of_the_photo_and_another_every_time():
    photo = np.random.RandomState(0).randint(0, 256, (40, 60, 3)).astype(np.uint8)
    rng = np.random.RandomState(1)
    views = [train.view_of(photo, rng) for _ in range(20)]
    assert len({view.tobytes() for view in views}) == 20
    for view in views:
        assert view.dtype == np.uint8 and view.flags.c_contiguous
        assert 0.3 * 2400 <= view.shape[0] * view.shape[1] <= 2400


@pytest.mark.parametrize('stop', [1, 3])
def test_a_training_that_was_cut_goes_on_to_the_bit(tmp_path, stop):
    def optimiser():
        layer = train.FullyConnectLayer(3, 2)
        layer.load_params(numbers(2, 3, dtype=np.float32), numbers(2, dtype=np.float32))
        return train.Adam({'fullyconnect1': layer}, 0.02)

    def steps(adam, count):
        layer = adam.layers['fullyconnect1']
        for _ in range(count):
            layer.forward(numbers(4, 3, seed=adam.steps, dtype=np.float32))
            layer.backward(numbers(4, 2, seed=adam.steps, dtype=np.float32))
            adam.step({'fullyconnect1': 0.1})
        return [layer.weight, layer.bias, adam.mean['fullyconnect1', 'weight']]
    whole = steps(optimiser(), 5)
    first, second, path = optimiser(), optimiser(), str(tmp_path / 'state.npz')
    steps(first, stop)
    train.save_state(path, first)
    train.load_state(path, second)
    for some, other in zip(steps(second, 5 - stop), whole):
        np.testing.assert_array_equal(some, other)
    assert os.listdir(str(tmp_path)) == ['state.npz']
