"""Why the loops are fast: one convolution, written a little better from rung to rung; then one pooling.

Read it from top to bottom, beside the table of `python tests/bench.py`.  Every rung of the convolution takes what the
handbook's `_conv` takes, for a stride of 1, and could stand in its place.  Up to layer.py's they add the terms of a sum
in the formula's order and agree with the textbook to the bit.

Backward needs no loops of its own: the gradient of the inputs is the same sum (see `turned`).
"""
import numpy as np
from numba import prange

import textbook
from layer import BAND, PITCH, ConvolutionLayer, MaxPoolLayer, jit


# -------------------------------------------------------------------------------------- rung 1: tests/textbook.py

# One output after the other, each with all of its terms.  A sum waits for each of its additions before the next, and a
# window's numbers lie in other rows and planes: the processor can take nothing side by side.


# --------------------------------------------------------------------------------- rung 2: the order of the loops

@jit(nopython=True)
def loop_order(inputs_pad, outputs, weight, bias, kernel_size, stride):
    """The textbook takes one output and looks for its weights and inputs; here one weight serves a whole plane."""
    batch, channels, height, width = outputs.shape
    for n in range(batch):
        for c in range(channels):
            outputs[n, c] = bias[c]
            for k in range(inputs_pad.shape[1]):
                for i in range(kernel_size):
                    for j in range(kernel_size):
                        for h in range(height):
                            _add_to_row(outputs[n, c, h], inputs_pad[n, k, h + i, j:j + width], weight[c, k, i, j])
    return outputs


@jit(nopython=True)
def _add_to_row(sums, x, a):
    """sums[p] += a * x[p].  Neighbours in memory are used one after another: 4 to 16 of them in one instruction.

    Alone in its function, because older compilers use such instructions in no other place.
    """
    for p in range(len(sums)):
        sums[p] += a * x[p]


# ---------------------------------------------------------------------- rung 3: several output channels at a time

@jit(nopython=True)
def four_channels(inputs_pad, outputs, weight, bias, kernel_size, stride):
    """A row of four channels at a time: a number that was read serves four sums, which are written to memory once."""
    batch, channels, height, width = outputs.shape
    assert width <= BAND
    sums = np.empty(4 * PITCH, outputs.dtype)
    for n in range(batch):
        for first in range(0, channels, 4):
            a, b, c, d = _next_four(first, channels)
            for h in range(height):
                _begin_four(sums, width, bias, first)
                for k in range(inputs_pad.shape[1]):
                    for i in range(kernel_size):
                        for j in range(kernel_size):
                            _add_to_four(sums, inputs_pad[n, k, h + i, j:j + width], weight[a, k, i, j],
                                         weight[b, k, i, j], weight[c, k, i, j], weight[d, k, i, j])
                _end_four(sums, outputs[n], first, h, h + 1, 0)
    return outputs


@jit(nopython=True)
def _next_four(first, channels):
    """Four channels from the first on; where fewer are left, the last one again and again."""
    last = channels - 1
    return first, min(first + 1, last), min(first + 2, last), min(first + 3, last)


@jit(nopython=True)
def _begin_four(sums, length, bias, first):
    for c in range(4):
        sums[c * PITCH:c * PITCH + length] = bias[min(first + c, len(bias) - 1)]


@jit(nopython=True)
def _end_four(sums, outputs, first, top, bottom, row):
    """Store the rows from top to bottom of the channels that there are; in the sums they begin `row` numbers apart."""
    for c in range(first, min(first + 4, len(outputs))):
        for h in range(top, bottom):
            start = (c - first) * PITCH + (h - top) * row
            outputs[c, h] = sums[start:start + outputs.shape[2]]


@jit(nopython=True)
def _add_to_four(sums, x, a, b, c, d):
    """sums[p], and the sums PITCH, 2 PITCH and 3 PITCH further on, += a, b, c and d times x[p].

    Indices are unsigned: a signed one could count from the end, and numba would look.
    """
    B, C, D = np.uint64(PITCH), np.uint64(2 * PITCH), np.uint64(3 * PITCH)
    p, one, end = np.uint64(0), np.uint64(1), np.uint64(len(x))
    while p < end:
        v = x[p]
        sums[p], sums[p + B] = sums[p] + a * v, sums[p + B] + b * v
        sums[p + C], sums[p + D] = sums[p + C] + c * v, sums[p + D] + d * v
        p += one


# ------------------------------------------------------------------------ rung 4: tiles that stay in the cache

@jit(nopython=True)
def tiles(inputs_pad, outputs, weight, bias, kernel_size, stride):
    """As many rows of four channels as BAND has room for: short rows no longer mean short loops."""
    return _by_tiles(inputs_pad, outputs, weight, bias, kernel_size, False)


@jit(nopython=True)
def _by_tiles(inputs_pad, outputs, weight, bias, kernel_size, three):
    """The planes are taken as one long line of numbers, in which a term of the sum is shifted by some numbers.

    At the end of a row the line goes on through the frame: a few sums too many, which are not stored.
    """
    batch, channels, height, width = outputs.shape
    K, row = kernel_size, inputs_pad.shape[3]
    assert row <= BAND
    shifts = np.empty(weight[0].size, np.int64)
    for t in range(len(shifts)):
        shifts[t] = (t // K // K * inputs_pad.shape[2] + t // K % K) * row + t % K
    w, sums = weight.reshape((channels, len(shifts))), np.empty(4 * PITCH, outputs.dtype)
    for n in range(batch):
        for top in range(0, height, BAND // row):
            bottom = min(height, top + BAND // row)
            length = (bottom - top - 1) * row + width
            line = inputs_pad[n].reshape(inputs_pad[n].size)[top * row:]
            for first in range(0, channels, 4):
                a, b, c, d = _next_four(first, channels)
                _begin_four(sums, length, bias, first)
                done = 0
                if three:
                    done = len(shifts) // 3 * 3
                    _add_three_to_four(sums, length, line, shifts[:done], w[a], w[b], w[c], w[d])
                for t in range(done, len(shifts)):
                    _add_to_four(sums, line[shifts[t]:shifts[t] + length], w[a, t], w[b, t], w[c, t], w[d, t])
                _end_four(sums, outputs[n], first, top, bottom, row)
    return outputs


# ----------------------------------------------------------------------------- rung 5: several taps at a time

@jit(nopython=True)
def three_taps(inputs_pad, outputs, weight, bias, kernel_size, stride):
    """A row of the window at a time: 12 multiply-adds for 7 numbers read and 4 written, not 4 for 5 and 4."""
    return _by_tiles(inputs_pad, outputs, weight, bias, kernel_size, True)


@jit(nopython=True)
def _add_three_to_four(sums, length, x, shifts, wa, wb, wc, wd):
    """12 weights, and what is in flight, are what 16 vector registers hold; with a fourth tap some would not fit."""
    B, C, D = np.uint64(PITCH), np.uint64(2 * PITCH), np.uint64(3 * PITCH)
    one, end = np.uint64(1), np.uint64(length)
    for t in range(0, len(shifts), 3):
        r0, r1, r2 = np.uint64(shifts[t]), np.uint64(shifts[t + 1]), np.uint64(shifts[t + 2])
        a0, a1, a2, b0, b1, b2 = wa[t], wa[t + 1], wa[t + 2], wb[t], wb[t + 1], wb[t + 2]
        c0, c1, c2, d0, d1, d2 = wc[t], wc[t + 1], wc[t + 2], wd[t], wd[t + 1], wd[t + 2]
        p = np.uint64(0)
        while p < end:
            u, v, w = x[r0 + p], x[r1 + p], x[r2 + p]
            sums[p] = sums[p] + a0 * u + a1 * v + a2 * w
            sums[p + B] = sums[p + B] + b0 * u + b1 * v + b2 * w
            sums[p + C] = sums[p + C] + c0 * u + c1 * v + c2 * w
            sums[p + D] = sums[p + D] + d0 * u + d1 * v + d2 * w
            p += one


# ------------------------------------------------------------------------------------ rung 6: threads, layer.py

# ConvolutionLayer._conv, the loops that ship.  A tile belongs to one thread: nobody waits for another, and no bit
# depends on how many there are.  A tile is whole vectors long, where x has room for that, and its sums begin where a
# line of the cache does.  With a stride, planes are cut into parts whose neighbours lie side by side.


# ----------------------------------------------------------------------------- rung 7: fewer multiplications

def winograd(inputs_pad, outputs, weight, bias, kernel_size, stride):
    """Windows of 3 x 3 with 16 multiplications in place of 36 (Winograd 1980; Lavin and Gray, arXiv 1509.09308).

    Two neighbouring outputs of a window of three numbers, y0 = x0 w0 + x1 w1 + x2 w2 and y1 = x1 w0 + x2 w1 + x3 w2,
    are six products.  Four are enough, m = X * W (multiply out to see it):

        X0 = x0 - x2    W0 = w0                      y0 = m0 + m1 + m2
        X1 = x1 + x2    W1 = (w0 + w1 + w2) / 2      y1 = m1 - m2 - m3
        X2 = x2 - x1    W2 = (w0 - w1 + w2) / 2
        X3 = x1 - x3    W3 = w2

    In a plane the step is taken down and across, in tiles of 2 x 2 outputs that read 4 x 4 inputs.  X is made once for
    all output channels, W once for all tiles, y after the sum over the input channels: what is left in the midst is 16
    convolutions of 1 x 1, one for each product, whose positions are the tiles.  Rung 6 knows how to do these.  Where
    few channels are read or written, X and y cost more than the products save.

    It is no part of layer.py.  The four outputs of a tile are made in different ways, so that equal windows may give
    numbers that are not equal; backward, another one is the first of the largest then, or a ReLU's zero.  Tiles of
    2 x 2 are kind: where a plane is of one number all products but one are 0, and outputs stay equal.  Larger tiles
    save more products, have factors such as 3/2 in their sums, and lose that, too.
    """
    if kernel_size != 3 or stride != 1:
        raise ValueError('a window of 3 and a stride of 1 expected, got %d and %d' % (kernel_size, stride))
    batch, channels, height, width = outputs.shape
    down, across, dtype = (height + 1) // 2, (width + 1) // 2, outputs.dtype
    # an odd row or column more, where a tile is only half inside
    x = np.pad(inputs_pad, ((0, 0), (0, 0), (0, 2 * down - height), (0, 2 * across - width)), mode='constant')
    W = np.empty((4, 4, channels, x.shape[1], 1, 1), dtype)
    _spread_weights(weight, W)
    rows = max(1, TILES // across)
    for top in range(0, down, rows):    # some rows of tiles at a time, which a cache has room for
        tiles = min(rows, down - top) * across
        X = np.empty((4, 4, batch, x.shape[1], 1, tiles), dtype)
        m = np.empty((4, 4, batch, channels, 1, tiles), dtype)
        _spread_inputs(x, X, top)
        for i in range(4):
            for j in range(4):
                ConvolutionLayer._conv(X[i, j], m[i, j], W[i, j], np.zeros(channels, dtype), 1, 1)
        _gather_outputs(m, bias, outputs, top)
    return outputs


TILES = 448
INPUTS = (0, 2, -1), (1, 2, 1), (2, 1, -1), (1, 3, -1)    # a, b and s of X_i = x_a + s * x_b
SIGNS = 1, -1                                             # s of y_i = m_i + s * (m_(i+1) + m_(i+2))


@jit(nopython=True, parallel=True)
def _spread_inputs(x, X, top):
    batch, channels, height, width = x.shape
    across, sign = width // 2 - 1, x.dtype.type
    for plane in prange(batch * channels):
        n, k = np.int64(plane) // channels, np.int64(plane) % channels
        sums = np.empty((4, width), x.dtype)
        for h in range(X.shape[5] // across):
            for i in range(4):    # down
                a, b, s = INPUTS[i]
                _add_two(sums[i], x[n, k, 2 * (top + h) + a], x[n, k, 2 * (top + h) + b], sign(s))
            for i in range(4):
                for j in range(4):    # across
                    a, b, s = INPUTS[j]
                    _add_two_apart(X[i, j, n, k, 0, h * across:(h + 1) * across], sums[i, a:], sums[i, b:], sign(s))


@jit(nopython=True)
def _add_two(out, a, b, s):
    for p in range(len(out)):
        out[p] = a[p] + s * b[p]


@jit(nopython=True)
def _add_two_apart(out, a, b, s):
    for p in range(len(out)):
        out[p] = a[2 * p] + s * b[2 * p]


@jit(nopython=True)
def _spread_weights(weight, W):
    for o in range(weight.shape[0]):
        t = np.empty((4, 3, weight.shape[1]))
        for k in range(weight.shape[1]):
            for j in range(3):    # down
                t[0, j, k], t[1, j, k], t[2, j, k], t[3, j, k] = _four_of_weights(
                    weight[o, k, 0, j], weight[o, k, 1, j], weight[o, k, 2, j])
        for i in range(4):
            for k in range(weight.shape[1]):    # across
                W[i, 0, o, k, 0, 0], W[i, 1, o, k, 0, 0], W[i, 2, o, k, 0, 0], W[i, 3, o, k, 0, 0] = _four_of_weights(
                    t[i, 0, k], t[i, 1, k], t[i, 2, k])


@jit(nopython=True)
def _four_of_weights(w0, w1, w2):
    w0, w1, w2 = np.float64(w0), np.float64(w1), np.float64(w2)    # rounded once, when they are stored
    return w0, (w0 + w1 + w2) / 2, (w0 - w1 + w2) / 2, w2


@jit(nopython=True, parallel=True)
def _gather_outputs(m, bias, outputs, top):
    batch, channels, height, width = outputs.shape
    across, sign = (width + 1) // 2, outputs.dtype.type
    for plane in prange(batch * channels):
        n, c = np.int64(plane) // channels, np.int64(plane) % channels
        y = np.empty((2, 4, across), outputs.dtype)
        for h in range(m.shape[5] // across):
            row = m[:, :, n, c, 0, h * across:(h + 1) * across]
            for i in range(min(2, height - 2 * (top + h))):
                for j in range(4):    # down
                    _add_three(y[i, j], row[i, j], row[i + 1, j], row[i + 2, j], sign(SIGNS[i]))
                for j in range(2):    # across
                    out = outputs[n, c, 2 * (top + h) + i, j:]
                    for p in range((len(out) + 1) // 2):
                        out[2 * p] = y[i, j, p] + sign(SIGNS[j]) * (y[i, j + 1, p] + y[i, j + 2, p]) + bias[c]


@jit(nopython=True)
def _add_three(out, a, b, c, s):
    for p in range(len(out)):
        out[p] = a[p] + s * (b[p] + c[p])


LAYER = 'threads (layer.py)'
RUNGS = {'textbook': textbook.conv, 'loop order': loop_order, 'four channels': four_channels, 'tiles': tiles,
         'three taps': three_taps, LAYER: ConvolutionLayer._conv, 'Winograd': winograd}


# ----------------------------------------------------------------------------------------------------- backward

def turned(out_grad, weight):
    """(inputs_pad, weight, bias) with which a rung computes the gradient of its inputs, frame and all.

    An input gets, from each output that it took part in, the gradient of that output times the weight that was between
    them: a sum over the gradients in a frame of K - 1 zeros, with the window turned, inputs and outputs exchanged.
    """
    frame = weight.shape[2] - 1
    framed = np.pad(out_grad, ((0, 0), (0, 0), (frame, frame), (frame, frame)), mode='constant')
    window = np.ascontiguousarray(weight.transpose(1, 0, 2, 3)[:, :, ::-1, ::-1])
    return framed, window, np.zeros(len(window), weight.dtype)


# ------------------------------------------------------------------------------------------ pooling, K = S = 2

# layer.py's loops, for any K and S, differ from the textbook's in one thing: they choose between two values instead of
# jumping to one of two places, which a processor would guess wrong half of the time.

@jit(nopython=True)
def windows_of_two(outputs, inputs, argidx, kernel_size, stride):
    """With K and S known there is no loop over a window, and 4 to 16 windows fit into one instruction.  No NaN."""
    for n in range(len(outputs)):
        for c in range(outputs.shape[1]):
            for h in range(outputs.shape[2]):
                _largest_of_four(outputs[n, c, h], argidx[n, c, h], inputs[n, c, 2 * h], inputs[n, c, 2 * h + 1])
    return outputs, argidx


@jit(nopython=True)
def _largest_of_four(y, argidx, upper, lower):
    for w in range(len(y)):
        a, b, c, d = upper[2 * w], upper[2 * w + 1], lower[2 * w], lower[2 * w + 1]
        best, index = (b, np.int32(1)) if b > a else (a, np.int32(0))
        best, index = (c, np.int32(2)) if c > best else (best, index)
        best, index = (d, np.int32(3)) if d > best else (best, index)
        y[w], argidx[w] = best, index


@jit(nopython=True)
def every_number_once(out_grad, in_grad, argidx, kernel_size, stride):
    """Windows that do not overlap: a number of in_grad is one gradient or 0, and no sum."""
    for n in range(len(out_grad)):
        for c in range(out_grad.shape[1]):
            for h in range(out_grad.shape[2]):
                _spread(out_grad[n, c, h], argidx[n, c, h], in_grad[n, c, 2 * h], in_grad[n, c, 2 * h + 1])
    return in_grad


@jit(nopython=True)
def _spread(out_grad, argidx, upper, lower):
    for w in range(len(out_grad)):
        upper[2 * w] = out_grad[w] if argidx[w] == 0 else 0
        upper[2 * w + 1] = out_grad[w] if argidx[w] == 1 else 0
        lower[2 * w] = out_grad[w] if argidx[w] == 2 else 0
        lower[2 * w + 1] = out_grad[w] if argidx[w] == 3 else 0


TWO = 'windows of 2 x 2'
POOLS = {'textbook': textbook.pool, 'layer.py': MaxPoolLayer._pool, TWO: windows_of_two}
POOLS_BACK = {'textbook': textbook.pool_back, 'layer.py': MaxPoolLayer._pool_back, TWO: every_number_once}


# ------------------------------------------------------------------- what the machine can do, by two small loops

QUARTER = 512


@jit(nopython=True)
def compute(x, a, b, rounds):
    """16 * rounds multiply-adds with each of the 4 * QUARTER numbers of x, which stay in the fastest cache."""
    for _ in range(rounds):
        _sixteen_multiply_adds(x, a, b)


@jit(nopython=True)
def _sixteen_multiply_adds(x, a, b):
    """Four numbers side by side: a processor begins eight multiply-adds or more before the first one is done."""
    Q, R, S = np.uint64(QUARTER), np.uint64(2 * QUARTER), np.uint64(3 * QUARTER)
    for p in range(np.uint64(QUARTER)):
        t, u, v, w = x[p], x[p + Q], x[p + R], x[p + S]
        for _ in range(16):
            t, u, v, w = t * a + b, u * a + b, v * a + b, w * a + b
        x[p], x[p + Q], x[p + R], x[p + S] = t, u, v, w


@jit(nopython=True, parallel=True)
def stream(x, y, a):
    """One multiplication for each number read and written, on arrays that no cache holds."""
    for p in prange(len(x)):
        y[p] = a * x[p]
