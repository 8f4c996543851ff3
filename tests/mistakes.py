"""What people get wrong: the handbook's formulas with one thing changed.

A case `c` is a layer at work: `c.kind`, the name of its class; `c.x`, what forward is given, and `c.g`, what backward
is; `c.weight`, `c.bias`, `c.K`, `c.P`, `c.S`, window, padding and stride, as far as the layer has them; `c.labels`,
of a loss.
RIGHT has the formulas themselves, MISTAKES the changed ones, each with the words that follow "equals the formula".
"""
from types import SimpleNamespace

import numpy as np

RIGHT, MISTAKES = {}, {}
SAME = 1e-4         # numbers that differ by less, relative to the largest, are equal but for rounding
DIFFERENT = 2e-3    # a formula that differs by less from the right one cannot be told from it


# ------------------------------------------------------------------------------------------------- the formulas

def framed(x, P, mode='constant', **value):
    """X_pad: planes with a frame of P numbers around them."""
    return np.pad(x, ((0, 0), (0, 0), (P, P), (P, P)), mode=mode, **value)


def at(x, i, j, height, width, S, S_across=None):
    """X(n, k, h * S + i, w * S + j), for all h and w."""
    T = S if S_across is None else S_across
    return x[:, :, i:i + (height - 1) * S + 1:S, j:j + (width - 1) * T + 1:T]


def size(length, K, S):
    return (length - K) // S + 1


def slide(x, weight, bias, S, step=None):
    """Y(n, c, h, w) = Bias(c) + sum over k, i, j of Weight(c, k, i, j) * X_pad(n, k, h * S + i, w * S + j)."""
    K, (height, width) = weight.shape[2], [size(length, weight.shape[2], S) for length in x.shape[2:]]
    y = np.zeros((len(x), len(weight), height, width)) + bias[:, None, None]
    for i in range(K):
        for j in range(K):
            y += np.einsum('ck,nkhw->nchw', weight[:, :, i, j], at(x, i, j, height, width, *(step or (S,))))
    return y


def conv(x, weight, bias, P, S):
    return slide(framed(x, P), weight, bias, S)


def spread(g, shape, weight, P, S, step=None):
    """in_grad_pad(n, k, h * S + i, w * S + j) collects out_grad(n, c, h, w) * Weight(c, k, i, j)."""
    in_grad = np.zeros(shape[:2] + (shape[2] + 2 * P, shape[3] + 2 * P))
    for i in range(weight.shape[2]):
        for j in range(weight.shape[2]):
            at(in_grad, i, j, *(g.shape[2:] + (step or (S,))))[...] += np.einsum('nchw,ck->nkhw', g, weight[:, :, i, j])
    return in_grad


def cut(in_grad, shape, P):
    return in_grad[:, :, P:P + shape[2], P:P + shape[3]]


def conv_back(g, shape, weight, P, S, step=None):
    return cut(spread(g, shape, weight, P, S, step), shape, P)


def windows(x, K, S, *step):
    """X(n, c, h * S + i, w * S + j) as an array (i * K + j, n, c, h, w)."""
    return np.stack([at(x, i, j, size(x.shape[2], K, S), size(x.shape[3], K, S), *(step or (S,)))
                     for i in range(K) for j in range(K)])


def pool(x, K, S):
    """Y(n, c, h, w) = max over i, j of X(n, c, h * S + i, w * S + j)."""
    return windows(x, K, S).max(axis=0)


def argmax(x, K, S):
    """i * K + j of the first maximum."""
    return windows(x, K, S).argmax(axis=0)


def pool_back(g, shape, index, K, *step):
    """in_grad(n, c, h * S + i, w * S + j) collects out_grad(n, c, h, w), i and j as noted in index."""
    in_grad = np.zeros(shape)
    for i in range(K):
        for j in range(K):
            at(in_grad, i, j, *(g.shape[2:] + step))[...] += np.where(index == i * K + j, g, 0)
    return in_grad


def softmax(x):
    """exp(x(n, c)) / sum over c of exp(x(n, c))."""
    power = np.exp(x - x.max(axis=1, keepdims=True))
    return power / power.sum(axis=1, keepdims=True)


def one_hot(c):
    return np.eye(c.x.shape[1])[c.labels]


def cross_entropy(c):
    """Mean over n of log(sum over c of exp(x(n, c))) - x(n, label(n))."""
    most = c.x.max(axis=1)
    return np.mean(most + np.log(np.exp(c.x - most[:, None]).sum(axis=1)) - c.x[one_hot(c) > 0])


RIGHT.update({
    ('ConvolutionLayer', 'forward'): lambda c: conv(c.x, c.weight, c.bias, c.P, c.S),
    ('ConvolutionLayer', 'backward'): lambda c: conv_back(c.g, c.x.shape, c.weight, c.P, c.S),
    ('MaxPoolLayer', 'forward'): lambda c: pool(c.x, c.K, c.S),
    ('MaxPoolLayer', 'backward'): lambda c: pool_back(c.g, c.x.shape, argmax(c.x, c.K, c.S), c.K, c.S),
    ('ReluLayer', 'forward'): lambda c: np.maximum(c.x, 0),
    ('ReluLayer', 'backward'): lambda c: np.where(c.x > 0, c.g, 0),
    ('FlattenLayer', 'forward'): lambda c: c.x.reshape(len(c.x), -1),
    ('FlattenLayer', 'backward'): lambda c: c.g.reshape(c.x.shape),
    ('FullyConnectLayer', 'forward'): lambda c: c.x.dot(c.weight.T) + c.bias,
    ('FullyConnectLayer', 'backward'): lambda c: c.g.dot(c.weight),
    ('CrossEntropy', 'forward'): cross_entropy,
    ('CrossEntropy', 'backward'): lambda c: (softmax(c.x) - one_hot(c)) / len(c.x),
})


# -------------------------------------------------------------------------------------------- loops that end early

def first(array, axes):
    """An array of which the first part along each of the first `axes` axes is left; the rest is zeros."""
    kept = np.zeros_like(array)
    kept[(slice(1),) * axes] = array[(slice(1),) * axes]
    return kept


def first_along(array, axis):
    return np.moveaxis(first(np.moveaxis(array, axis, 0), 1), 0, axis)


def but_last(array, axis):
    """An array whose last part along an axis is zeros."""
    kept = array.copy()
    kept[(slice(None),) * axis + (-1,)] = 0
    return kept


def in_part(c, direction, change):
    """What is computed of a part of what forward returns, or of the gradient that backward is given."""
    if direction == 'forward':
        return change(right(c, direction))
    return right(type(c)(**dict(vars(c), g=change(c.g))), direction)


IN_PART = [
    ('for the first image alone, as after a return inside the loop', lambda array: first(array, 1)),
    ('for the first channel alone, as after a return inside the loop', lambda array: first(array, 2)),
    ('for the first row alone, as after a return inside the loop', lambda array: first(array, 3)),
    ('for the first number alone, as after a return inside the loop', lambda array: first(array, array.ndim)),
    ('for the first channel of each image alone', lambda array: first_along(array, 1)),
    ('for the first row of each channel alone', lambda array: first_along(array, 2)),
    ('for the first column of each channel alone', lambda array: first_along(array, 3)),
    ('without the last channel, as of a loop that ends one early', lambda array: but_last(array, 1)),
    ('without the last row, as of a loop that ends one early', lambda array: but_last(array, 2)),
    ('without the last column, as of a loop that ends one early', lambda array: but_last(array, 3)),
    ('without the last row and column, as of loops that end one early',
     lambda array: but_last(but_last(array, 2), 3)),
]


# -------------------------------------------------------------------------------------------------- convolution

def last_product(c):
    """y = for y +=: what k, i, j came to last."""
    last = np.zeros((c.K, c.K))
    last[-1, -1] = 1
    return conv(c.x[:, -1:], c.weight[:, -1:] * last, 0 * c.bias, c.P, c.S)


def frame_at_the_end(c):
    """inputs_pad[:, :, :H, :W] = inputs."""
    return slide(np.pad(c.x, ((0, 0), (0, 0), (0, 2 * c.P), (0, 2 * c.P)), mode='constant'), c.weight, c.bias, c.S)


def last_write(c, g):
    """in_grad[n, k, h * S + i, w * S + j] = for +=, in the order of h and w."""
    in_grad = np.zeros(c.x.shape[:2] + (c.x.shape[2] + 2 * c.P, c.x.shape[3] + 2 * c.P))
    for h in range(g.shape[2]):
        for w in range(g.shape[3]):
            in_grad[:, :, h * c.S:h * c.S + c.K, w * c.S:w * c.S + c.K] = np.einsum(
                'nc,ckij->nkij', g[:, :, h, w], c.weight[-g.shape[1]:])
    return cut(in_grad, c.x.shape, c.P)


MISTAKES['ConvolutionLayer', 'forward'] = [
    ('without the bias', lambda c: conv(c.x, c.weight, 0 * c.bias, c.P, c.S)),
    ('without padding', lambda c: conv(c.x, c.weight, c.bias, 0, c.S)),
    ('with a frame of ones', lambda c: slide(framed(c.x, c.P, constant_values=1), c.weight, c.bias, c.S)),
    ('with the border repeated in place of zeros', lambda c: slide(framed(c.x, c.P, 'edge'), c.weight, c.bias, c.S)),
    ('with the frame at the bottom and on the right alone', frame_at_the_end),
    ('with the window turned by 180 degrees (a true convolution)',
     lambda c: conv(c.x, c.weight[:, :, ::-1, ::-1], c.bias, c.P, c.S)),
    ('with i and j exchanged', lambda c: conv(c.x, c.weight.transpose(0, 1, 3, 2), c.bias, c.P, c.S)),
    ('with h and w exchanged', lambda c: conv(c.x, c.weight, c.bias, c.P, c.S).transpose(0, 1, 3, 2)),
    ('with the weight\'s channels exchanged', lambda c: conv(c.x, c.weight.transpose(1, 0, 2, 3), c.bias, c.P, c.S)),
    ('without the stride', lambda c: slide(framed(c.x, c.P), c.weight, c.bias, c.S, (1, 1))),
    ('with the stride for rows alone', lambda c: slide(framed(c.x, c.P), c.weight, c.bias, c.S, (c.S, 1))),
    ('with the stride for columns alone', lambda c: slide(framed(c.x, c.P), c.weight, c.bias, c.S, (1, c.S))),
    ('of the first input channel alone', lambda c: conv(c.x[:, :1], c.weight[:, :1], c.bias, c.P, c.S)),
    ('without the last input channel', lambda c: conv(c.x[:, :-1], c.weight[:, :-1], c.bias, c.P, c.S)),
    ('without the last row and column of the window',
     lambda c: conv(c.x, but_last(but_last(c.weight, 2), 3), c.bias, c.P, c.S)),
    ('with = for +=, of which the last product is left', last_product),
    ('with = for +=, of which the last product and the bias are left',
     lambda c: last_product(c) + c.bias[:, None, None]),
    ('with the bias added to each product',
     lambda c: conv(c.x, c.weight, c.bias * c.weight[0].size, c.P, c.S)),
    ('with the first channel\'s bias for all', lambda c: conv(c.x, c.weight, 0 * c.bias + c.bias[0], c.P, c.S)),
    ('with the first image for all', lambda c: conv(0 * c.x + c.x[:1], c.weight, c.bias, c.P, c.S)),
    ('with a ReLU in it', lambda c: np.maximum(conv(c.x, c.weight, c.bias, c.P, c.S), 0)),
]
MISTAKES['ConvolutionLayer', 'backward'] = [
    ('with = for +=, of which the last write is left', lambda c: last_write(c, c.g[:, -1:])),
    ('with = for += where windows overlap', lambda c: last_write(c, c.g)),
    ('with the frame not cut off', lambda c: spread(c.g, c.x.shape, c.weight, c.P, c.S)),
    ('with the frame cut off one too early',
     lambda c: cut(spread(c.g, c.x.shape, c.weight, c.P, c.S), c.x.shape, c.P - 1)),
    ('with the frame cut off one too late',
     lambda c: cut(spread(c.g, c.x.shape, c.weight, c.P, c.S), c.x.shape, c.P + 1)),
    ('with the window turned by 180 degrees',
     lambda c: conv_back(c.g, c.x.shape, c.weight[:, :, ::-1, ::-1], c.P, c.S)),
    ('with i and j exchanged', lambda c: conv_back(c.g, c.x.shape, c.weight.transpose(0, 1, 3, 2), c.P, c.S)),
    ('with h and w exchanged', lambda c: conv_back(c.g.transpose(0, 1, 3, 2), c.x.shape, c.weight, c.P, c.S)),
    ('with the weight\'s channels exchanged',
     lambda c: conv_back(c.g, c.x.shape, c.weight.transpose(1, 0, 2, 3), c.P, c.S)),
    ('without the stride', lambda c: conv_back(c.g, c.x.shape, c.weight, c.P, c.S, (1, 1))),
    ('with the stride for rows alone', lambda c: conv_back(c.g, c.x.shape, c.weight, c.P, c.S, (c.S, 1))),
    ('with the stride for columns alone', lambda c: conv_back(c.g, c.x.shape, c.weight, c.P, c.S, (1, c.S))),
    ('for the first input channel alone',
     lambda c: np.where(np.arange(c.x.shape[1])[:, None, None] < 1, conv_back(c.g, c.x.shape, c.weight, c.P, c.S), 0)),
    ('without the last row and column of the window',
     lambda c: conv_back(c.g, c.x.shape, but_last(but_last(c.weight, 2), 3), c.P, c.S)),
]

# -------------------------------------------------------------------------------------------------- max pooling


def last_argmax(c):
    return c.K * c.K - 1 - windows(c.x, c.K, c.S)[::-1].argmax(axis=0)


def assigned(c):
    """in_grad[n, c, h * S + i, w * S + j] = for +=, in the order of h and w."""
    in_grad, index = np.zeros(c.x.shape), argmax(c.x, c.K, c.S)
    for h in range(c.g.shape[2]):
        for w in range(c.g.shape[3]):
            for i in range(c.K):
                for j in range(c.K):
                    mine = index[:, :, h, w] == i * c.K + j
                    in_grad[:, :, h * c.S + i, w * c.S + j][mine] = c.g[:, :, h, w][mine]
    return in_grad


def indexed(change):
    """The gradient by another index, made of the right one, K and the windows' maxima."""
    return lambda c: pool_back(c.g, c.x.shape, change(argmax(c.x, c.K, c.S), c.K, pool(c.x, c.K, c.S)), c.K, c.S)


MISTAKES['MaxPoolLayer', 'forward'] = [
    ('with a maximum that starts from 0', lambda c: np.maximum(pool(c.x, c.K, c.S), 0)),
    ('without the stride', lambda c: windows(c.x, c.K, c.S, 1, 1).max(axis=0)),
    ('with the stride for rows alone', lambda c: windows(c.x, c.K, c.S, c.S, 1).max(axis=0)),
    ('with the stride for columns alone', lambda c: windows(c.x, c.K, c.S, 1, c.S).max(axis=0)),
    ('with h and w exchanged', lambda c: pool(c.x, c.K, c.S).transpose(0, 1, 3, 2)),
    ('with the minimum', lambda c: -pool(-c.x, c.K, c.S)),
    ('with the mean', lambda c: windows(c.x, c.K, c.S).mean(axis=0)),
    ('with the largest magnitude', lambda c: pool(abs(c.x), c.K, c.S)),
    ('with the first number of each window', lambda c: windows(c.x, c.K, c.S)[0]),
    ('with the last number of each window', lambda c: windows(c.x, c.K, c.S)[-1]),
    ('without the last row and column of the window',
     lambda c: windows(c.x, c.K, c.S).reshape((c.K, c.K) + c.g.shape)[:-1, :-1].max(axis=(0, 1))),
    ('with the first image for all', lambda c: pool(0 * c.x + c.x[:1], c.K, c.S)),
    ('with the first channel for all', lambda c: pool(0 * c.x + c.x[:, :1], c.K, c.S)),
]
MISTAKES['MaxPoolLayer', 'backward'] = [
    ('with the index read as j * K + i', indexed(lambda index, K, _: index % K * K + index // K)),
    ('with an index that is one too large', indexed(lambda index, K, _: (index + 1) % (K * K))),
    ('with an index that is one too small', indexed(lambda index, K, _: (index - 1) % (K * K))),
    ('with the index of a maximum that starts from 0', indexed(lambda index, K, best: np.where(best > 0, index, 0))),
    ('with the index of the last of equal maxima', lambda c: pool_back(c.g, c.x.shape, last_argmax(c), c.K, c.S)),
    ('with the first number of each window for the maximum', indexed(lambda index, K, _: 0 * index)),
    ('with the last number of each window for the maximum', indexed(lambda index, K, _: 0 * index + K * K - 1)),
    ('with = for += where windows overlap', assigned),
    ('without the stride', lambda c: pool_back(c.g, c.x.shape, argmax(c.x, c.K, c.S), c.K, 1, 1)),
    ('with the stride for rows alone', lambda c: pool_back(c.g, c.x.shape, argmax(c.x, c.K, c.S), c.K, c.S, 1)),
    ('with the stride for columns alone', lambda c: pool_back(c.g, c.x.shape, argmax(c.x, c.K, c.S), c.K, 1, c.S)),
    ('with h and w exchanged',
     lambda c: pool_back(c.g.transpose(0, 1, 3, 2), c.x.shape, argmax(c.x, c.K, c.S), c.K, c.S)),
    ('with the gradient for all of the window', lambda c: sum(
        pool_back(c.g, c.x.shape, np.full(c.g.shape, k), c.K, c.S) for k in range(c.K * c.K))),
    ('with the gradient shared by all of the window', lambda c: sum(
        pool_back(c.g / c.K**2, c.x.shape, np.full(c.g.shape, k), c.K, c.S) for k in range(c.K * c.K))),
    ('with the maximum itself for the gradient',
     lambda c: pool_back(pool(c.x, c.K, c.S), c.x.shape, argmax(c.x, c.K, c.S), c.K, c.S)),
    ('with the first image\'s index for all', lambda c: pool_back(
        c.g, c.x.shape, argmax(0 * c.x + c.x[:1], c.K, c.S), c.K, c.S)),
    ('with the first channel\'s index for all', lambda c: pool_back(
        c.g, c.x.shape, argmax(0 * c.x + c.x[:, :1], c.K, c.S), c.K, c.S)),
]

# ---------------------------------------------------------------------------------- the other layers and the loss

MISTAKES['ReluLayer', 'forward'] = [
    ('with negative numbers left as they are', lambda c: c.x),
    ('with the magnitude', lambda c: abs(c.x)),
    ('with the minimum', lambda c: np.minimum(c.x, 0)),
    ('with 0.01 of negative numbers left (a leaky ReLU)', lambda c: np.where(c.x > 0, c.x, 0.01 * c.x)),
    ('with ones for positive numbers', lambda c: 1. * (c.x > 0)),
]
MISTAKES['ReluLayer', 'backward'] = [
    ('with the gradient passed everywhere', lambda c: c.g),
    ('with the sign of the gradient for that of the inputs', lambda c: np.where(c.g > 0, c.g, 0)),
    ('with the gradient passed where the inputs are negative', lambda c: np.where(c.x < 0, c.g, 0)),
    ('with the gradient times the inputs', lambda c: np.where(c.x > 0, c.g * c.x, 0)),
    ('with 0.01 of the gradient passed where the inputs are negative (a leaky ReLU)',
     lambda c: np.where(c.x > 0, c.g, 0.01 * c.g)),
    ('with ones for the gradient', lambda c: 1. * (c.x > 0)),
]
MISTAKES['FlattenLayer', 'forward'] = [
    ('with h and w exchanged', lambda c: c.x.transpose(0, 1, 3, 2).reshape(len(c.x), -1)),
    ('with the channels last', lambda c: c.x.transpose(0, 2, 3, 1).reshape(len(c.x), -1)),
    ('with the axes in reverse order', lambda c: c.x.transpose(0, 3, 2, 1).reshape(len(c.x), -1)),
    ('with the images flattened, too', lambda c: c.x.reshape(-1)),
]
MISTAKES['FlattenLayer', 'backward'] = [
    ('with the gradient left flat', lambda c: c.g),
    ('with h and w exchanged', lambda c: c.g.reshape([c.x.shape[k] for k in (0, 1, 3, 2)]).transpose(0, 1, 3, 2)),
    ('with the channels last', lambda c: c.g.reshape([c.x.shape[k] for k in (0, 2, 3, 1)]).transpose(0, 3, 1, 2)),
    ('with the axes in reverse order',
     lambda c: c.g.reshape([c.x.shape[k] for k in (0, 3, 2, 1)]).transpose(0, 3, 2, 1)),
]
MISTAKES['FullyConnectLayer', 'forward'] = [
    ('without the bias', lambda c: c.x.dot(c.weight.T)),
    ('with the weight transposed', lambda c: c.x.dot(c.weight) + c.bias),
    ('with = for +=, of which the last product is left', lambda c: c.x[:, -1:].dot(c.weight[:, -1:].T)),
    ('with = for +=, of which the last product and the bias are left',
     lambda c: c.x[:, -1:].dot(c.weight[:, -1:].T) + c.bias),
    ('with the first image for all', lambda c: (0 * c.x + c.x[:1]).dot(c.weight.T) + c.bias),
    ('with a ReLU in it', lambda c: np.maximum(c.x.dot(c.weight.T) + c.bias, 0)),
]
MISTAKES['FullyConnectLayer', 'backward'] = [
    ('with the weight transposed', lambda c: c.g.dot(c.weight.T)),
    ('with = for +=, of which the last product is left', lambda c: c.g[:, -1:].dot(c.weight[-1:])),
    ('with the first image for all', lambda c: (0 * c.g + c.g[:1]).dot(c.weight)),
]


def overflowing(c):
    """exp(x) / sum over c of exp(x), without the maximum taken off first."""
    return np.exp(c.x) / np.exp(c.x).sum(axis=1, keepdims=True)


MISTAKES['CrossEntropy', 'forward'] = [
    ('with the sum over the images for the mean', lambda c: cross_entropy(c) * len(c.x)),
    ('with the sign turned', lambda c: -cross_entropy(c)),
    ('with the logarithm to base 2', lambda c: cross_entropy(c) / np.log(2)),
    ('with the logarithm to base 10', lambda c: cross_entropy(c) / np.log(10)),
    ('without the logarithm', lambda c: -softmax(c.x)[one_hot(c) > 0].mean()),
    ('without the softmax', lambda c: -c.x[one_hot(c) > 0].mean()),
    ('with a mean over the classes, too', lambda c: cross_entropy(c) / c.x.shape[1]),
    ('without the maximum taken off before exp, which overflows',
     lambda c: -np.log(overflowing(c)[one_hot(c) > 0]).mean()),
]
MISTAKES['CrossEntropy', 'backward'] = [
    ('without the division by the number of images', lambda c: softmax(c.x) - one_hot(c)),
    ('without 1 taken off at the label', lambda c: softmax(c.x) / len(c.x)),
    ('with the sign turned', lambda c: (one_hot(c) - softmax(c.x)) / len(c.x)),
    ('with a division by the number of classes', lambda c: (softmax(c.x) - one_hot(c)) / c.x.size),
    ('with the logits for the softmax', lambda c: (c.x - one_hot(c)) / len(c.x)),
    ('without the maximum taken off before exp, which overflows',
     lambda c: (overflowing(c) - one_hot(c)) / len(c.x)),
]


# ------------------------------------------------------------------------------------------------------- cases

TINY = [    # layers with batches, strides, overlapping windows and odd sizes, which VGG16 has not got; their inputs
    ('ConvolutionLayer', (2, 3, 3, 1, 1), (2, 2, 5, 6)), ('ConvolutionLayer', (2, 3, 3, 1, 2), (2, 2, 6, 7)),
    ('MaxPoolLayer', (2, 2), (2, 3, 5, 7)), ('MaxPoolLayer', (3, 1), (2, 2, 5, 6)),
    ('MaxPoolLayer', (3, 2), (2, 2, 6, 7)),
    ('ReluLayer', (), (2, 3, 4, 5)), ('FlattenLayer', (), (2, 3, 4, 5)), ('FullyConnectLayer', (7, 4), (2, 7))]


def case(kind, arguments, shape, rng, weight=None, bias=None):
    """A layer, made of these arguments, at work on random numbers."""
    c = SimpleNamespace(kind=kind, weight=weight, bias=bias, x=rng.randn(*shape).astype(np.float32), g=None)
    if kind in ('ConvolutionLayer', 'FullyConnectLayer') and weight is None:
        form = arguments[1::-1] + arguments[2:3] * 2
        c.weight, c.bias = rng.randn(*form).astype(np.float32), rng.randn(form[0]).astype(np.float32)
    if kind == 'ConvolutionLayer':
        c.K, c.P, c.S = arguments[2:]
    if kind == 'MaxPoolLayer':
        c.K, c.S = arguments
    c.g = rng.randn(*right(c, 'forward').shape)
    return c


# --------------------------------------------------------------------------------------------- telling what it was

def near(a, b, tolerance):
    """Whether two results are equal but for rounding, relative to the largest number, with NaN in the same places."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or not np.array_equal(np.isnan(a), np.isnan(b)):
        return False
    a, b = np.nan_to_num(a), np.nan_to_num(b)
    return bool((abs(a - b) <= tolerance * max(abs(b).max(initial=0), 1e-30)).all())


def right(c, direction):
    return RIGHT[c.kind, direction](c)


def explain(c, direction, found):
    """The first mistake that explains what a layer computed, in words; None where none does, or it is right."""
    parts = IN_PART if c.kind != 'CrossEntropy' else []
    tries = MISTAKES[c.kind, direction] + [
        (words, lambda c, change=change: in_part(c, direction, change)) for words, change in parts]
    with np.errstate(all='ignore'):
        expected = right(c, direction)
        for words, function in tries if np.any(found) and not near(found, expected, SAME) else ():
            try:
                wrong = function(c)
            except (ValueError, IndexError):    # a change that this layer's sizes do not allow
                continue
            if near(found, wrong, SAME) and not near(wrong, expected, DIFFERENT):
                return 'equals the formula ' + words
    return None


# -------------------------------------------------------------------------------- what can be seen, without a guess

def place(index, shape):
    return tuple(int(i) for i in np.unravel_index(index, shape))


def seen(actual, expected, wrong, off):
    """What can be seen of a wrong result, without a guess."""
    if not actual.any():
        return 'all zeros'
    ratio = np.vdot(actual, expected) / max(np.vdot(expected, expected), np.finfo(np.float64).tiny)
    size = np.abs(expected).sum(dtype=np.float64)
    if abs(ratio - 1) > 1e-3 and np.abs(actual - ratio * expected).sum() <= 1e-3 * abs(ratio) * size:
        return '%.4f times what it should be' % ratio
    axes = (('image', 'channel', 'row', 'column') if actual.ndim == 4 else ('image', 'number'))[:actual.ndim]
    for axis, name in enumerate(axes):
        others = tuple(other for other in range(actual.ndim) if other != axis)
        bad, = np.nonzero(wrong.any(axis=others))
        if 0 < len(bad) < actual.shape[axis]:
            zeros = not np.take(actual, bad, axis).any()
            if zeros or bad[-1] - bad[0] < len(bad) and (len(bad) < 3 or len(bad) <= actual.shape[axis] // 2):
                return '%s %s, the others are right' % (span(name, bad), 'zeros' if zeros else 'wrong')
    if actual.ndim == 4 and min(actual.shape[2:]) > 4 and not wrong[:, :, 1:-1, 1:-1].any():
        return 'right but for its outermost rows and columns'
    if actual.ndim == 4 and actual.shape[2] == actual.shape[3] and near(
            actual.swapaxes(2, 3), expected, SAME):
        return 'rows and columns are exchanged'
    if wrong.mean() < 0.5:
        return '%.2g %% of its numbers are wrong' % max(100 * wrong.mean(), 1e-4)
    return 'off by %.2g of its sum of magnitudes' % (off.sum(dtype=np.float64) / size if size else np.inf)


def span(name, numbers):
    """'channel 3 is', 'channels 1 to 63 are', or 'channels 1, 5, 6, ... are'."""
    if len(numbers) == 1:
        return '%s %d is' % (name, numbers[0])
    if numbers[-1] - numbers[0] == len(numbers) - 1:
        return '%ss %d to %d are' % (name, numbers[0], numbers[-1])
    return '%ss %s%s are' % (name, ', '.join(map(str, numbers[:3])), ', ...' if len(numbers) > 3 else '')
