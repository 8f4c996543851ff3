"""Print a line for every tensor of a run, forward and backward, with a hash: equal hashes mean equal bits.

    python tests/tensors.py [IMAGE] [--ckpt PATH] [--label NAME_OR_NUMBER]

A line has the direction, the layer that the tensor enters, dtype, shape, sum of magnitudes and hash.

The transcript of main.py prints numpy's sums, whose last digit depends on the order in which a version of numpy adds.
The tensors themselves do not: compare these lines between machines, Pythons and numbers of threads.
"""
import hashlib
import sys

import numpy as np

from network import loaded, main, walk


def line(direction, name, tensor):
    digest = hashlib.sha256(np.ascontiguousarray(tensor).tobytes()).hexdigest()
    return '%-8s  %-14s  %s  %-13s  %.4e  %s' % (
        direction, name, tensor.dtype, 'x'.join(map(str, tensor.shape)), np.abs(tensor).sum(dtype=np.float64),
        digest[:16])


if __name__ == '__main__':
    arguments = main.arguments_of(sys.argv[1:])
    for step in walk(loaded(arguments.ckpt), main.process_image(arguments.image), arguments.label):
        print(line(*step), flush=True)
