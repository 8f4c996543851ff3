"""Why the loops are fast: one convolution and one pooling, written a little better from rung to rung.

Read it from top to bottom, beside the times that `python tests/bench.py` prints.  The first rung is the formula as
it stands, in tests/textbook.py; every later one computes the same sums, and layer.py goes on from the last one.
The planes are those of one picture and already padded: x (C_in, H + 2P, W + 2P), y (C_out, H, W),
weight (C_out, C_in, K, K), bias (C_out,), stride 1.

Backward needs no loops of its own.  The gradient of x collects, from each y that x took part in, the gradient of
that y times the weight that was between them: a convolution again, of the gradients with a frame of zeros, with the
window reversed and with inputs and outputs exchanged.
"""
import numpy as np
from numba import prange

from layer import _align_stack, _widest_vectors, kernel

BAND = 1024          # positions of a tile: 4 bytes each, four channels of it are half of a 32 KiB cache
PITCH = BAND + 48    # between the sums of two channels: exactly 4096 bytes apart, they would evict each other


# ------------------------------------------------------------------------ rung 2: the order of the loops

@kernel
def add_to_row(sums, x, a):
    """sums[p] += a * x[p].  Neighbours in memory are used one after another: 8 or 16 of them in one instruction.

    Alone in its function, because older compilers use such instructions in no other place.
    """
    for p in range(len(sums)):
        sums[p] += a * x[p]


@kernel
def loop_order(x, y, weight, bias):
    """The textbook takes one output and looks for its weights and inputs; here one weight serves a whole plane."""
    channels, height, width = y.shape
    for c in range(channels):
        y[c] = bias[c]
        for k in range(weight.shape[1]):
            for i in range(weight.shape[2]):
                for j in range(weight.shape[3]):
                    for h in range(height):
                        add_to_row(y[c, h], x[k, h + i, j:j + width], weight[c, k, i, j])
    return y


# ------------------------------------------------------------- rung 3: several output channels at a time

@kernel
def add_to_four(sums, x, a, b, c, d):
    """sums[p], and the sums PITCH, 2 PITCH and 3 PITCH further on, += a, b, c and d times x[p].

    A number that was read is used four times.  Indices are unsigned: numba tests signed ones for being negative.
    """
    B, C, D = np.uint64(PITCH), np.uint64(2 * PITCH), np.uint64(3 * PITCH)
    for p in range(np.uint64(len(x))):
        v = x[p]
        sums[p] += a * v
        sums[p + B] += b * v
        sums[p + C] += c * v
        sums[p + D] += d * v


@kernel
def next_four(first, channels):
    """Four channels from the first on; where fewer are left, the last one again and again."""
    last = channels - 1
    return min(first, last), min(first + 1, last), min(first + 2, last), min(first + 3, last)


@kernel
def four_channels(x, y, weight, bias):
    """One row of four channels at a time: its sums grow in a small array and are written to y once."""
    channels, height, width = y.shape
    assert width <= PITCH
    sums = np.empty(4 * PITCH, dtype=x.dtype)
    for first in range(0, channels, 4):
        four = next_four(first, channels)
        a, b, c, d = four
        for h in range(height):
            for n in range(4):
                sums[n * PITCH:n * PITCH + width] = bias[four[n]]
            for k in range(weight.shape[1]):
                for i in range(weight.shape[2]):
                    for j in range(weight.shape[3]):
                        add_to_four(sums, x[k, h + i, j:j + width], weight[a, k, i, j], weight[b, k, i, j],
                                    weight[c, k, i, j], weight[d, k, i, j])
            for n in range(4):
                y[four[n], h] = sums[n * PITCH:n * PITCH + width]
    return y


# --------------------------------------------------------------- rung 4: tiles that stay in the cache

@kernel
def taps_of(x, weight):
    """Where in the planes, taken as one long line of numbers, each term of the formula's sum is read: k, i, j."""
    reads = np.empty(weight[0].size, dtype=np.int64)
    t = 0
    for k in range(weight.shape[1]):
        for i in range(weight.shape[2]):
            for j in range(weight.shape[3]):
                reads[t] = (k * x.shape[1] + i) * x.shape[2] + j
                t += 1
    return reads


@kernel
def tile_of(job, x, y, weight, bias, reads, several_taps):
    """Four channels of as many rows of y as BAND has room for: all taps are added before the next tile is begun.

    As one long line, rows of 14 numbers run as smoothly as rows of 224.  At the end of a row the line goes on
    through the padding: a few sums too many, which are not stored.
    """
    channels, height, width = y.shape
    row = x.shape[2]
    rows = BAND // row
    bands = (height + rows - 1) // rows
    four = next_four(job // bands * 4, channels)
    top = job % bands * rows
    bottom = min(height, top + rows)
    length = (bottom - top - 1) * row + width
    line, w = x.reshape(-1)[top * row:], weight.reshape(channels, -1)
    sums = np.empty(4 * PITCH, dtype=x.dtype)
    a, b, c, d = four
    for n in range(4):
        sums[n * PITCH:n * PITCH + length] = bias[four[n]]
    t = 0
    while several_taps and t + 4 <= len(reads):
        add_four_to_four(sums, length, line, reads[t:t + 4], w[a, t:t + 4], w[b, t:t + 4], w[c, t:t + 4], w[d, t:t + 4])
        t += 4
    while t < len(reads):
        add_to_four(sums, line[reads[t]:reads[t] + length], w[a, t], w[b, t], w[c, t], w[d, t])
        t += 1
    for n in range(4):
        for h in range(top, bottom):
            start = n * PITCH + (h - top) * row
            y[four[n], h] = sums[start:start + width]


@kernel(parallel=True)
def tiles(x, y, weight, bias, several_taps):
    """All tiles.  prange shares them out among the threads of rung 6; the rungs before it run on one.

    A tile belongs to one thread: nobody waits for another, and the sums are the same whoever computes them.
    """
    assert x.shape[2] <= BAND
    reads = taps_of(x, weight)
    rows = BAND // x.shape[2]
    for job in prange((y.shape[0] + 3) // 4 * ((y.shape[1] + rows - 1) // rows)):
        tile_of(job, x, y, weight, bias, reads, several_taps)
    return y


# ----------------------------------------------------------------------- rung 5: several taps at a time

@kernel
def add_four_to_four(sums, length, line, reads, a, b, c, d):
    """Four taps for four channels: 16 multiply-adds for 8 numbers read and 4 written, not 4 for 5 and 4."""
    a0, a1, a2, a3 = a[0], a[1], a[2], a[3]
    b0, b1, b2, b3 = b[0], b[1], b[2], b[3]
    c0, c1, c2, c3 = c[0], c[1], c[2], c[3]
    d0, d1, d2, d3 = d[0], d[1], d[2], d[3]
    r0, r1, r2, r3 = np.uint64(reads[0]), np.uint64(reads[1]), np.uint64(reads[2]), np.uint64(reads[3])
    B, C, D = np.uint64(PITCH), np.uint64(2 * PITCH), np.uint64(3 * PITCH)
    for p in range(np.uint64(length)):
        x0, x1, x2, x3 = line[r0 + p], line[r1 + p], line[r2 + p], line[r3 + p]
        sums[p] = sums[p] + a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3
        sums[p + B] = sums[p + B] + b0 * x0 + b1 * x1 + b2 * x2 + b3 * x3
        sums[p + C] = sums[p + C] + c0 * x0 + c1 * x1 + c2 * x2 + c3 * x3
        sums[p + D] = sums[p + D] + d0 * x0 + d1 * x1 + d2 * x2 + d3 * x3


# ------------------------------------------------------------------------- pooling, K = S = 2, rung by rung

@kernel
def largest(y, argidx, upper, lower):
    """A row of outputs from two rows of inputs.  A choice of two values needs no jump that could be guessed wrong."""
    for w in range(len(y)):
        a, b, c, d = upper[2 * w], upper[2 * w + 1], lower[2 * w], lower[2 * w + 1]
        best, index = (b, np.int32(1)) if b > a else (a, np.int32(0))
        best, index = (c, np.int32(2)) if c > best else (best, index)
        best, index = (d, np.int32(3)) if d > best else (best, index)
        y[w], argidx[w] = best, index


@kernel(parallel=True)
def row_by_row(y, x, argidx):
    for c in prange(y.shape[0]):
        for h in range(y.shape[1]):
            largest(y[c, h], argidx[c, h], x[c, 2 * h], x[c, 2 * h + 1])
    return y


@kernel
def spread(out_grad, argidx, upper, lower):
    """Two rows of the gradient, every number written once, with no zeros to be written before."""
    for w in range(len(out_grad)):
        upper[2 * w] = out_grad[w] if argidx[w] == 0 else 0
        upper[2 * w + 1] = out_grad[w] if argidx[w] == 1 else 0
        lower[2 * w] = out_grad[w] if argidx[w] == 2 else 0
        lower[2 * w + 1] = out_grad[w] if argidx[w] == 3 else 0


@kernel(parallel=True)
def every_number_once(out_grad, in_grad, argidx):
    for c in prange(out_grad.shape[0]):
        for h in range(out_grad.shape[1]):
            spread(out_grad[c, h], argidx[c, h], in_grad[c, 2 * h], in_grad[c, 2 * h + 1])
    return in_grad


# --------------------------------------------------------------- what the machine can do, by two small loops

QUARTER = 512


@kernel
def sixteen_multiply_adds(x, a, b):
    """Four numbers side by side: a processor begins eight multiply-adds or more before the first one is done."""
    _align_stack()    # what has one of its own is not made a part of its caller
    _widest_vectors()
    Q, R, S = np.uint64(QUARTER), np.uint64(2 * QUARTER), np.uint64(3 * QUARTER)
    for p in range(np.uint64(QUARTER)):
        t, u, v, w = x[p], x[p + Q], x[p + R], x[p + S]
        for _ in range(16):
            t, u, v, w = t * a + b, u * a + b, v * a + b, w * a + b
        x[p], x[p + Q], x[p + R], x[p + S] = t, u, v, w


@kernel(parallel=True)
def compute(x, a, b, rounds):
    """16 multiply-adds for each number read and written, on rows of 4 * QUARTER that stay in the fastest cache."""
    for job in prange(len(x)):
        for _ in range(rounds):
            sixteen_multiply_adds(x[job], a, b)


@kernel(parallel=True)
def stream(x, y, a):
    """One multiplication for each number read and written, on arrays that no cache holds."""
    for p in prange(len(x)):
        y[p] = a * x[p]
