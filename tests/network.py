"""The network of vgg.py with its parameters, and one run of it, tensor by tensor."""
import contextlib
import io
import os
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import main    # noqa: E402


def loaded(path=None):
    """VGG16 with a checkpoint's parameters, by default the shipped one's."""
    model = main.VGG16(4)
    with contextlib.redirect_stdout(io.StringIO()):
        model.resume_weights(main.load_checkpoint(path))
    return model


def walk(model, inputs, label):
    """(direction, layer, what it is given), from the picture to the logits and back to the picture's gradient.

    A layer may work in place: what was given before is to be looked at before the next.
    """
    for name, layer in model.graph_layers.items():
        yield 'forward', name, inputs
        inputs = layer.forward(inputs)
    yield 'forward', 'logits', inputs
    loss = main.CrossEntropy()
    loss.forward(inputs, np.array([label]))
    grad = loss.backward()
    for name, layer in reversed(list(model.graph_layers.items())):
        yield 'backward', name, grad
        grad = layer.backward(grad)
    yield 'backward', 'picture', grad
