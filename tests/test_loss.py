"""Softmax cross-entropy against its formula, against torch and against the slope."""
import numpy as np
import pytest

import textbook
from loss import CrossEntropy
from test_calls import numbers
from test_layers import assert_numerical_gradient, needs_torch, torch


@pytest.mark.parametrize('batch', [1, 5])
def test_loss_and_gradient_are_the_formula(batch):
    logits, labels = numbers(batch, 4), np.arange(batch) % 4
    loss = CrossEntropy()
    expected = textbook.cross_entropy(logits, labels)
    np.testing.assert_allclose(loss.forward(logits, labels), expected[0], rtol=1e-12)
    np.testing.assert_allclose(loss.backward(), expected[1], rtol=1e-12, atol=1e-15)


def test_gradient_is_the_slope():
    logits, labels = numbers(3, 4), np.array([2, 0, 2])
    loss = CrossEntropy()
    loss.forward(logits, labels)
    gradient = loss.backward()
    assert_numerical_gradient(lambda x: CrossEntropy().forward(x, labels), logits, 1.0, gradient)
    np.testing.assert_allclose(gradient.sum(axis=1), 0, atol=1e-16)


@needs_torch
def test_loss_and_gradient_are_torchs():
    logits, labels = numbers(6, 4), np.array([0, 1, 2, 3, 3, 0])
    x = torch.tensor(logits, requires_grad=True)
    expected = torch.nn.functional.cross_entropy(x, torch.tensor(labels))
    expected.backward()
    loss = CrossEntropy()
    np.testing.assert_allclose(loss.forward(logits, labels), expected.item(), rtol=1e-12)
    np.testing.assert_allclose(loss.backward(), x.grad.numpy(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('dtype', [np.float32, np.float64])
def test_logits_far_apart(dtype):
    loss = CrossEntropy()
    assert loss.forward(np.array([[1e4, -1e4, 0, 0]], dtype), np.array([1])) == 2e4
    np.testing.assert_array_equal(loss.backward(), [[1, -1, 0, 0]])
    assert loss.forward(np.array([[1e4, -1e4, 0, 0]], dtype), np.array([0])) == 0
    np.testing.assert_array_equal(loss.backward(), [[0, 0, 0, 0]])


def test_an_empty_batch_has_no_loss():
    loss = CrossEntropy()
    assert loss.forward(np.zeros((0, 4)), np.zeros(0, int)) == 0
    assert loss.backward().shape == (0, 4)


@pytest.mark.parametrize('labels, error', [
    ([0, 4], ValueError), ([-1, 0], ValueError), ([0], ValueError), ([[0, 1]], ValueError), ([0., 1.], TypeError)])
def test_wrong_labels_are_refused(labels, error):
    with pytest.raises(error, match='labels'):
        CrossEntropy().forward(numbers(2, 4), np.array(labels))
