"""Print a line for every tensor of a run, forward and backward, with a hash: equal hashes mean equal bits.

    python tests/tensors.py [IMAGE] [--ckpt PATH] [--label NAME_OR_NUMBER]

A line has the direction, the layer that the tensor enters, dtype, shape, sum of magnitudes and hash.

The transcript of main.py prints numpy's sums, whose last digit depends on the order in which a version of numpy adds.
The tensors themselves do not: compare these lines between machines, Pythons and numbers of threads.
"""
import contextlib
import hashlib
import io
import os
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import main                        # noqa: E402
from file import checkpoint, once  # noqa: E402
from loss import CrossEntropy      # noqa: E402
from vgg import VGG16              # noqa: E402


def tensors(image, ckpt=None, label=1):
    """The lines, one after another."""
    def line(direction, name, tensor):
        digest = hashlib.sha256(np.ascontiguousarray(tensor).tobytes()).hexdigest()
        return '%-8s  %-14s  %s  %-13s  %.4e  %s' % (
            direction, name, tensor.dtype, 'x'.join(map(str, tensor.shape)),
            np.abs(tensor).sum(dtype=np.float64), digest[:16])

    model = VGG16(4)
    with contextlib.redirect_stdout(io.StringIO()):
        model.resume_weights(checkpoint.load(ckpt))
    tensor = main.process_image(image)
    for name, layer in model.graph_layers.items():
        yield line('forward', name, tensor)
        tensor = layer.forward(tensor)
    yield line('forward', 'logits', tensor)
    loss = CrossEntropy()
    loss.forward(tensor, np.array([label]))
    tensor = loss.backward()
    for name, layer in reversed(list(model.graph_layers.items())):
        yield line('backward', name, tensor)
        tensor = layer.backward(tensor)
    yield line('backward', 'picture', tensor)


if __name__ == '__main__':
    arguments = main.arguments_of(sys.argv[1:])
    once.compile_once()
    for text in tensors(arguments.image, arguments.ckpt, arguments.label):
        print(text)
