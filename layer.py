"""The five layers of VGG16: a formula, then for loops that numba compiles, forward and backward.

`forward(inputs)` returns the layer's output.  `backward(out_grad)` takes the gradient of the loss with respect to that
output and returns the one with respect to the inputs.  Pictures are stacks of planes, shape (N, C, H, W): image,
channel, row, column.  An index says whose it is: n image, c output channel, k input channel, h and w row and column of
an output, i and j row and column in a window.

The same formulas as the plainest loops there are stand in tests/textbook.py; how they became fast, step by step, in
tests/ladder.py.  With NUMBA_DISABLE_JIT=1 every loop here runs as plain Python, slowly, for a debugger.
"""
import operator

import numba
import numpy as np
from numba import prange


def jit(**options):
    """numba's jit, keeping machine code on the disk where a folder can be written.

    'contract' lets the compiler round a * b + c once instead of twice (a fused multiply-add, which every x86 since 2013
    and every 64-bit Arm has).  It is the one freedom given to it: the order of every sum stays as written.  It makes a
    convolution about 1.5 times as fast, and each result slightly more accurate.
    """
    def compiled(function):
        try:
            return numba.jit(cache=True, fastmath={'contract'}, **options)(function)
        except RuntimeError:    # numba found no place for its cache: compile in every run
            return numba.jit(fastmath={'contract'}, **options)(function)
    return compiled


def _size(name, size, least=1):
    """The size as an int; TypeError or ValueError names it."""
    try:
        size = operator.index(size)
    except TypeError:
        raise TypeError('%s: a whole number expected, got %r' % (name, size)) from None
    if size < least:
        raise ValueError('%s: at least %d expected, got %d' % (name, least, size))
    return size


def _numbers(name, array, shape=None):
    """The array, contiguous, if its numbers are float32 or float64 and it has the shape; None stands for any length."""
    array = np.require(array, requirements='C')
    if array.dtype not in (np.float32, np.float64):
        raise TypeError('%s: float32 or float64 numbers expected, got %s' % (name, array.dtype))
    if shape is not None and (array.ndim != len(shape) or any(
            wanted not in (None, length) for wanted, length in zip(shape, array.shape))):
        wanted = ', '.join('any' if length is None else str(length) for length in shape)
        raise ValueError('%s: shape (%s) expected, got %s' % (name, wanted, array.shape))
    return array


def _parameter(name, array):
    """The array as float32 or float64: itself, or a copy where those hold exactly the numbers of another kind."""
    array = np.asarray(array)
    if array.dtype in (np.float32, np.float64) and array.dtype.isnative:
        return array
    if array.dtype.kind in 'fiuO':
        try:
            with np.errstate(all='ignore'):
                converted = array.astype(np.float32 if array.dtype.itemsize <= 4 and array.dtype.kind == 'f' else float)
                if np.all((converted.astype(array.dtype) == array) | (array != array)):
                    return converted
        except (TypeError, ValueError, OverflowError):    # of an object that is no number
            pass
    raise TypeError('%s: numbers that float32 or float64 hold exactly expected, got %s' % (name, array.dtype))


def _forward_first(state):
    """What forward left for backward."""
    if state is None:
        raise RuntimeError('backward needs a forward first: it uses what forward saw')
    return state


class normal(object):
    """Random numbers N(loc, scale ** 2) of numpy's global seed, not drawn yet."""

    def __init__(self, loc, scale, size):
        self.loc, self.scale, self.size = loc, scale, size


class DrawnWhenRead(object):
    """The attribute `weight`: where it is set to `normal(...)`, the numbers are drawn when they are first read.

    A network that loads a checkpoint never reads its initial weights: 134 million random numbers, 5 seconds and 1 GB.
    """

    def __get__(self, layer, owner):
        if layer is None:
            return self
        if isinstance(layer.__dict__['weight'], normal):
            drawn = layer.__dict__['weight']
            layer.__dict__['weight'] = np.random.normal(drawn.loc, drawn.scale, drawn.size)
        return layer.__dict__['weight']

    def __set__(self, layer, weight):
        layer.__dict__['weight'] = weight


# ----------------------------------------------------------------------------------------------------- convolution

class ConvolutionLayer(object):
    """Convolution of planes, handbook 2.2.1.1 and 2.5.2.1.

    With x_pad the inputs in a frame of P zeros, a window of K x K and a step of S, forward is

        y(n, c, h, w) = bias(c) + sum over k, i, j of weight(c, k, i, j) * x_pad(n, k, h * S + i, w * S + j)

    and backward collects, for every product of this sum, what its x_pad gets of the gradient of its y:

        in_grad_pad(n, k, h * S + i, w * S + j) += out_grad(n, c, h, w) * weight(c, k, i, j)

    Forward   inputs (N, C_in, H, W) -> (N, C_out, H_out, W_out), H_out = floor((H + 2P - K) / S + 1), W_out alike;
              float32 or float64, and the outputs are of the same dtype.
    Backward  out_grad, of the shape of the outputs -> (N, C_in, H, W), float64; the frame of in_grad_pad is cut off.
    State     weight (C_out, C_in, K, K), bias (C_out,), input_shape.
    Errors    TypeError and ValueError name the argument that has other numbers or another shape; RuntimeError: backward
              before forward; AssertionError: a parameter of another shape.

    >>> layer = ConvolutionLayer(in_channels=1, out_channels=1, kernel_size=2)
    >>> layer.load_params(np.array([[[[1., 0.], [0., 10.]]]]), np.array([100.]))
    >>> layer.forward(np.array([[[[1., 2., 3.], [4., 5., 6.]]]]))
    array([[[[151., 162.]]]])
    >>> layer.backward(np.array([[[[1., 2.]]]]))
    array([[[[ 1.,  2.,  0.],
             [ 0., 10., 20.]]]])
    """

    weight = DrawnWhenRead()

    def __init__(self, in_channels, out_channels, kernel_size, padding=0, stride=1):
        # 输入、输出各有几个平面 / planes read and planes written
        self.in_channels = _size('in_channels', in_channels)
        self.out_channels = _size('out_channels', out_channels)
        # 窗口的边长 / side of the square window
        self.kernel_size = _size('kernel_size', kernel_size)
        # 窗口每次移动几格 / how far the window moves
        self.stride = _size('stride', stride)
        # 平面四周补几圈零 / rows and columns of zeros around a plane
        self.padding = _size('padding', padding, least=0)

        # 权重：第一次读取时才抽取随机数 / weights, drawn when they are first read
        self.weight = normal(loc=0.0, scale=0.01,
                             size=(self.out_channels, self.in_channels, self.kernel_size, self.kernel_size))

        # 每个输出平面一个偏置 / one bias for each plane written
        self.bias = np.zeros([self.out_channels])

        # 上一次输入的形状，留给反向传播 / shape of the last inputs, for backward
        self.input_shape = None

    def forward(self, inputs):
        inputs = _numbers('inputs', inputs, (None, self.in_channels, None, None))
        _check_fit(inputs.shape[2] + self.padding * 2, inputs.shape[3] + self.padding * 2, self.kernel_size)
        # 记下形状 / note the shape
        self.input_shape = inputs.shape
        batch, channel, height, width = inputs.shape

        # 补零之后的高和宽 / height and width with the frame of zeros
        pad_height = height + self.padding * 2
        pad_width = width + self.padding * 2

        # 把输入放进零框的中间 / put the inputs into the frame
        inputs_pad = np.zeros((batch, channel, pad_height, pad_width), dtype=inputs.dtype)
        inputs_pad[:, :, self.padding:height + self.padding, self.padding:width + self.padding] = inputs

        # 输出的高和宽 / height and width of the outputs
        out_height = int((pad_height - self.kernel_size) / self.stride + 1)
        out_width = int((pad_width - self.kernel_size) / self.stride + 1)
        outputs = np.zeros((batch, self.out_channels, out_height, out_width), dtype=inputs.dtype)

        # 公式本身 / the formula itself
        outputs = self._conv(inputs_pad, outputs, self.weight, self.bias, self.kernel_size, self.stride)
        return outputs

    def backward(self, out_grad):
        # 由上一次输入的形状得出各个大小 / all sizes follow from the shape of the last inputs
        batch, channel, height, width = _forward_first(self.input_shape)
        pad_height = height + self.padding * 2
        pad_width = width + self.padding * 2
        out_height = int((pad_height - self.kernel_size) / self.stride + 1)
        out_width = int((pad_width - self.kernel_size) / self.stride + 1)
        out_grad = _numbers('out_grad', out_grad, (batch, self.out_channels, out_height, out_width))

        # 连同零框的输入梯度 / the gradient of the inputs in their frame
        in_grad = np.zeros((batch, channel, pad_height, pad_width))

        # 公式本身 / the formula itself
        in_grad = self._conv_back(out_grad, in_grad, self.weight, self.kernel_size, self.stride)

        # 去掉零框 / cut the frame off
        in_grad = in_grad[:, :, self.padding:height + self.padding, self.padding:width + self.padding]
        return in_grad

    def load_params(self, weight, bias):
        assert weight.shape == (self.out_channels, self.in_channels, self.kernel_size, self.kernel_size), weight.shape
        assert bias.shape == self.bias.shape, bias.shape
        self.weight, self.bias = _parameter('weight', weight), _parameter('bias', bias)

    @staticmethod
    @jit(nopython=True, parallel=True)
    def _conv(inputs_pad, outputs, weight, bias, kernel_size, stride):
        # 公式的每一项：读哪个数，乘哪个权重 / each term of the formula: which number it reads, which weight it takes
        x, row, taps, w, b, tiles = _terms(outputs, inputs_pad, weight, bias, kernel_size, stride)
        # 每块由一个线程算完 / a tile is one thread's
        for tile in prange(tiles):
            _sum_tile(np.int64(tile), x, row, taps, w, weight[0].size, b, outputs)
        return outputs

    @staticmethod
    @jit(nopython=True, parallel=True)
    def _conv_back(out_grad, in_grad, weight, kernel_size, stride):
        # 同一个求和：梯度放进零框，窗口倒过来，输入输出互换
        # the same sum: the gradients in a frame of zeros, the window turned, inputs and outputs exchanged
        x, row, w, nothing = _room_for_frame(out_grad, in_grad, weight, kernel_size, stride)
        for plane in prange(out_grad.shape[0] * out_grad.shape[1]):
            _put_into_frame(np.int64(plane), out_grad, x, row)
        # 步长为 S 时，in_grad 分成 S * S 部分，各有各的项 / with a stride, S * S parts of in_grad have terms of their own
        for part in range(min(stride, kernel_size)**2):    # as far as a window reaches
            grads, taps, tiles = _terms_back(part, out_grad, in_grad, kernel_size, stride)
            for tile in prange(tiles):
                _sum_tile(np.int64(tile), x, row, taps, w, weight[0, 0].size, nothing, grads)
        return in_grad


def _check_fit(height, width, kernel_size):
    if min(height, width) < kernel_size:
        raise ValueError('inputs: a window of %d does not fit into %d x %d' % (kernel_size, height, width))


@jit(nopython=True)
def _terms(outputs, inputs_pad, weight, bias, K, S):
    """(x, row, taps, w, b, tiles) of _conv's sum: planes and weights as long lines, the bias, and the number of tiles.

    With a stride, a plane is cut into S * S parts, so that what lies S apart becomes neighbours, and a step of the
    window is a step of one: number (k, h * S + i, w * S + j) goes to part (k, i, j), row h, column w.
    """
    batch, in_channels, height, width = inputs_pad.shape
    _check_conv(outputs.shape, inputs_pad.shape, weight.shape, len(bias) - len(weight), K, S)
    rows, row, planes, M = (height + S - 1) // S, (width + S - 1) // S, inputs_pad, min(S, K)
    if S > 1:
        behind = 1 + VECTOR // (rows * row)    # planes of zeros: room for a vector, as the last tap is not the furthest
        planes = np.zeros((batch, in_channels * M * M + behind, rows, row), inputs_pad.dtype)
        for n in range(batch):
            for part in range(in_channels * M * M):
                k, i, j = part // M // M, part // M % M, part % M    # no window reaches more than M of the S
                for h in range((height - i + S - 1) // S):
                    for w in range((width - j + S - 1) // S):
                        planes[n, part, h, w] = inputs_pad[n, k, h * S + i, w * S + j]
    taps = np.empty((in_channels * K * K, 2), np.int64)
    for t in range(len(taps)):
        k, i, j = t // K // K, t // K % K, t % K
        taps[t, 0] = (((k * M + i % S) * M + j % S) * rows + i // S) * row + j // S
        taps[t, 1] = t
    x, w = _line(planes), _line(weight)
    b = np.full(len(bias), bias[0] + w[0] * inputs_pad.dtype.type(0))    # in the dtype of such sums
    for c in range(len(bias)):
        b[c] = bias[c]
    return x, row, taps, w, b, _bands(outputs.shape, row)[0]


@jit(nopython=True)
def _room_for_frame(out_grad, in_grad, weight, K, S):
    """(x, row, w, nothing) of _conv_back's sum: room for planes in frames of (K - 1) // S zeros, and a bias of zeros.

    The zeros at the end of a row are those at the start of the next, so that a row of x is as long as one of in_grad.
    """
    batch, out_channels, height, width = out_grad.shape
    _check_conv(out_grad.shape, in_grad.shape, weight.shape, 0, K, S)
    frame = (K - 1) // S
    planes = out_channels * (height + 2 * frame) * (width + frame)
    x = np.empty((batch, planes + frame + VECTOR), in_grad.dtype)
    for n in range(batch):
        for p in range(planes, planes + frame + VECTOR):
            x[n, p] = 0
    return x.reshape(x.size), width + frame, _line(weight), np.zeros(in_grad.shape[1], in_grad.dtype)


@jit(nopython=True)
def _put_into_frame(plane, out_grad, x, row):
    batch, channels, height, width = out_grad.shape
    n, c, frame = plane // channels, plane % channels, row - width
    rows = height + 2 * frame
    line = x[n * (len(x) // batch) + c * rows * row:]
    for p in range(rows * row):
        line[p] = 0
    for h in range(height):
        for w in range(width):
            line[(frame + h) * row + frame + w] = out_grad[n, c, h, w]


@jit(nopython=True)
def _terms_back(part, out_grad, in_grad, K, S):
    """(grads, taps, tiles) of _conv_back's sum for a part of in_grad: the rows that leave d over when divided by S and
    the columns that leave e.  They meet the weights with i % S == d and j % S == e."""
    out_channels, height, width = out_grad.shape[1:]
    in_channels, frame, d, e, met = in_grad.shape[1], (K - 1) // S, part // min(S, K), part % min(S, K), 0
    rows, row = height + 2 * frame, width + frame
    taps = np.empty((out_channels * K * K, 2), np.int64)
    for t in range(len(taps)):
        c, i, j = t // K // K, K - 1 - t // K % K, K - 1 - t % K
        if i % S == d and j % S == e:
            taps[met, 0] = (c * rows + frame - i // S) * row + frame - j // S
            taps[met, 1] = (c * in_channels * K + i) * K + j
            met += 1
    grads = in_grad[:, :, d:(height + frame) * S:S, e:row * S:S]
    return grads, taps[:met], _bands(grads.shape, row)[0]


@jit(nopython=True)
def _check_conv(outputs, inputs_pad, weight, biases, K, S):
    """The loops read and write what these shapes say: they have to fit each other."""
    if (weight[0] != outputs[1] or weight[1] != inputs_pad[1] or weight[2] != K or weight[3] != K or biases != 0
            or outputs[0] != inputs_pad[0] or min(weight[0], weight[1], K, S) < 1
            or inputs_pad[2] < (outputs[2] - 1) * S + K or inputs_pad[3] < (outputs[3] - 1) * S + K):
        raise ValueError('the shapes of planes, weight and bias do not fit each other, kernel_size and stride')


@jit(nopython=True)
def _line(numbers):
    return np.ascontiguousarray(numbers).reshape(numbers.size)


BAND = 512           # positions of a tile, at most: the sums of four channels stay in the fastest cache
PITCH = BAND + 48    # between the sums of two channels: a power of two apart, they would evict each other
VECTOR = 16          # numbers that a processor takes at a time, at most


@jit(nopython=True)
def _bands(shape, row):
    """(number of tiles for planes of a shape, bands of a plane, positions of a band: whole vectors)."""
    batch, channels, height, width = shape
    positions = max(0, (height - 1) * row + width)
    bands = (positions + BAND - 1) // BAND
    band = (positions + bands * VECTOR - 1) // max(1, bands * VECTOR) * VECTOR
    return batch * ((channels + 3) // 4) * bands, bands, band


@jit(nopython=True)
def _sum_tile(tile, x, row, taps, weight, apart, bias, out):
    """One tile of the sum at the heart of both directions: a band of four channels c of a picture n.

        out[n, c, h, w] = bias[c] + sum over taps t of weight[c * apart + taps[t, 1]] * x[n, taps[t, 0] + h * row + w]

    x[n] are the planes of a picture as one long line of numbers, `row` of them a row: the next position is always the
    next number, and a plane of 14 x 14 runs as smoothly as one of 224 x 224.  The positions between the end of one row
    and the start of the next are computed as well, and dropped.  The taps are added in their order, and a tile writes
    only what is its own: the same bits for any number of threads.
    """
    batch, channels, height, width = out.shape
    _, bands, band = _bands(out.shape, row)
    groups = (channels + 3) // 4
    n, first, group = tile // groups // bands, tile // groups % bands * band, tile % groups * 4
    length = min(band, (height - 1) * row + width - first)
    whole = (length + VECTOR - 1) // VECTOR * VECTOR
    line = x[n * (len(x) // batch) + first:]

    sums = np.empty(4 * PITCH + VECTOR, bias.dtype)
    sums = sums[-sums.ctypes.data % 64 // sums.itemsize:]    # a vector then lies in one line of the cache, not in two
    four = np.empty(4, np.int64)
    for c in range(4):
        channel = min(group + c, channels - 1)    # past the last channel again that one, and not stored
        four[c] = channel * apart
        for p in range(c * PITCH, c * PITCH + whole):
            sums[p] = bias[channel]

    # whole vectors, as far as they do not end behind the last number of x; three taps at a time
    inside = len(taps)
    while inside > 0 and taps[inside - 1, 0] + whole > len(line):
        inside -= 1
    inside -= inside % 3
    _add_three_taps(sums, whole, line, taps, inside, weight, four)
    _add_taps(sums, length, line, taps, inside, weight, four)

    for c in range(min(4, channels - group)):
        for h in range(first // row, min(height, (first + length - 1) // row + 1)):
            start = c * PITCH + h * row - first
            for p in range(max(0, first - h * row), min(width, first + length - h * row)):
                out[n, group + c, h, p] = sums[start + p]


@jit(nopython=True)
def _add_three_taps(sums, length, x, taps, end, weight, four):
    """sums[c * PITCH + p] += sum over t < end of weight[four[c] + taps[t, 1]] * x[taps[t, 0] + p], c < 4, p < length.

    Each x that is read serves four channels, each sum that is read and written serves three taps (a row of a 3 x 3
    window): 12 multiply-adds for 7 numbers read and 4 written.  More weights would not stay in the 16 vector registers
    that a processor has at least.  Indices are unsigned, as a signed one could count from the end, and numba would look;
    and the loop's end is visibly a multiple of VECTOR: no vector is left half full.
    """
    B, C, D = np.uint64(PITCH), np.uint64(2 * PITCH), np.uint64(3 * PITCH)
    one, last = np.uint64(1), np.uint64(length // VECTOR * VECTOR)
    wa, wb, wc, wd = np.uint64(four[0]), np.uint64(four[1]), np.uint64(four[2]), np.uint64(four[3])
    for t in range(0, end, 3):
        r0, r1, r2 = np.uint64(taps[t, 0]), np.uint64(taps[t + 1, 0]), np.uint64(taps[t + 2, 0])
        q0, q1, q2 = np.uint64(taps[t, 1]), np.uint64(taps[t + 1, 1]), np.uint64(taps[t + 2, 1])
        a0, a1, a2 = weight[wa + q0], weight[wa + q1], weight[wa + q2]
        b0, b1, b2 = weight[wb + q0], weight[wb + q1], weight[wb + q2]
        c0, c1, c2 = weight[wc + q0], weight[wc + q1], weight[wc + q2]
        d0, d1, d2 = weight[wd + q0], weight[wd + q1], weight[wd + q2]
        p = np.uint64(0)
        while p < last:
            a, b, c, d = sums[p], sums[p + B], sums[p + C], sums[p + D]
            v = x[r0 + p]
            a, b, c, d = a + a0 * v, b + b0 * v, c + c0 * v, d + d0 * v
            v = x[r1 + p]
            a, b, c, d = a + a1 * v, b + b1 * v, c + c1 * v, d + d1 * v
            v = x[r2 + p]
            a, b, c, d = a + a2 * v, b + b2 * v, c + c2 * v, d + d2 * v
            sums[p], sums[p + B], sums[p + C], sums[p + D] = a, b, c, d
            p += one


@jit(nopython=True)
def _add_taps(sums, length, x, taps, begin, weight, four):
    """The same for all taps from `begin` on and any length, position by position: for the few that are left over."""
    for p in range(length):
        a, b, c, d = sums[p], sums[p + PITCH], sums[p + 2 * PITCH], sums[p + 3 * PITCH]
        for t in range(begin, len(taps)):
            v, q = x[taps[t, 0] + p], taps[t, 1]
            a, b = a + weight[four[0] + q] * v, b + weight[four[1] + q] * v
            c, d = c + weight[four[2] + q] * v, d + weight[four[3] + q] * v
        sums[p], sums[p + PITCH], sums[p + 2 * PITCH], sums[p + 3 * PITCH] = a, b, c, d


# --------------------------------------------------------------------------------------------------------- pooling

class MaxPoolLayer(object):
    """The largest number of each window, handbook 2.2.1.2 and 2.5.2.2.

        y(n, c, h, w) = max over i, j of x(n, c, h * S + i, w * S + j)

    argidx(n, c, h, w) = i * K + j notes where it was found: the first one of equals, row by row; a NaN is larger than
    every number.  Backward, the gradient goes there, and where windows overlap it adds up:

        in_grad(n, c, h * S + i, w * S + j) += out_grad(n, c, h, w)

    Forward   inputs (N, C, H, W) -> (N, C, H_out, W_out), H_out = floor((H - K) / S + 1), W_out alike; float32 or
              float64, and the outputs are of the same dtype.
    Backward  out_grad, of the shape of the outputs -> (N, C, H, W), float64.
    State     argidx (N, C, H_out, W_out) int32, input_shape, output_shape.
    Errors    as for a convolution.

    >>> layer = MaxPoolLayer(kernel_size=2, stride=2)
    >>> layer.forward(np.array([[[[1., 5., 2., 0.], [3., 4., 9., 1.]]]]))
    array([[[[5., 9.]]]])
    >>> layer.argidx
    array([[[[1, 2]]]], dtype=int32)
    >>> layer.backward(np.array([[[[7., 8.]]]]))
    array([[[[0., 7., 0., 0.],
             [0., 0., 8., 0.]]]])
    """

    def __init__(self, kernel_size=2, stride=2):
        # 窗口的边长 / side of the square window
        self.kernel_size = _size('kernel_size', kernel_size)
        # 窗口每次移动几格 / how far the window moves
        self.stride = _size('stride', stride)
        # 最大值在窗口里的位置，留给反向传播 / where in its window each maximum was, for backward
        self.argidx = None
        # 输入的形状 / shape of the last inputs
        self.input_shape = None
        # 输出的形状 / shape of the last outputs
        self.output_shape = None

    def forward(self, inputs):
        inputs = _numbers('inputs', inputs, (None, None, None, None))
        batch, channel, height, width = inputs.shape
        _check_fit(height, width, self.kernel_size)

        # 输出的高和宽 / height and width of the outputs
        out_height = int((height - self.kernel_size) / self.stride + 1)
        out_width = int((width - self.kernel_size) / self.stride + 1)
        outputs = np.zeros((batch, channel, out_height, out_width), dtype=inputs.dtype)

        # 记下形状，准备索引 / note the shapes, make room for the indices
        self.input_shape = inputs.shape
        self.output_shape = outputs.shape
        self.argidx = np.zeros_like(outputs, dtype=np.int32)

        # 公式本身 / the formula itself
        outputs, self.argidx = self._pool(outputs, inputs, self.argidx, self.kernel_size, self.stride)
        return outputs

    def backward(self, out_grad):
        # 输入的梯度，先全为零 / the gradient of the inputs, zeros at first
        in_grad = np.zeros(_forward_first(self.input_shape))
        out_grad = _numbers('out_grad', out_grad, self.output_shape)

        # 公式本身 / the formula itself
        in_grad = self._pool_back(out_grad, in_grad, self.argidx, self.kernel_size, self.stride)
        return in_grad

    @staticmethod
    @jit(nopython=True)
    def _pool(outputs, inputs, argidx, kernel_size, stride):
        _check_pool(outputs.shape, inputs.shape, argidx.shape, kernel_size, stride)
        batch, channel, out_height, out_width = outputs.shape
        K, S = kernel_size, stride
        for n in range(batch):
            for c in range(channel):
                for h in range(out_height):
                    for w in range(out_width):
                        largest, index = inputs[n, c, h * S, w * S], 0
                        for i in range(K):
                            for j in range(K):
                                x = inputs[n, c, h * S + i, w * S + j]
                                # & and | instead of jumps, which would be guessed wrong half of the time
                                wins = (x > largest) | ((x != x) & (largest == largest))
                                largest, index = x if wins else largest, i * K + j if wins else index
                        outputs[n, c, h, w], argidx[n, c, h, w] = largest, index
        return outputs, argidx

    @staticmethod
    @jit(nopython=True)
    def _pool_back(out_grad, in_grad, argidx, kernel_size, stride):
        _check_pool(out_grad.shape, in_grad.shape, argidx.shape, kernel_size, stride)
        batch, channel, out_height, out_width = out_grad.shape
        K, S = kernel_size, stride
        for n in range(batch):
            for c in range(channel):
                for h in range(out_height):
                    for w in range(out_width):
                        index = argidx[n, c, h, w]
                        if index < 0 or index >= K * K:
                            raise ValueError('argidx: numbers from 0 to K * K - 1 expected')
                        in_grad[n, c, h * S + index // K, w * S + index % K] += out_grad[n, c, h, w]
        return in_grad


@jit(nopython=True)
def _check_pool(outputs, inputs, argidx, K, S):
    """The loops read and write what these shapes say: they have to fit each other."""
    if (outputs[0] != inputs[0] or outputs[1] != inputs[1] or argidx != outputs or K < 1 or S < 1
            or inputs[2] < (outputs[2] - 1) * S + K or inputs[3] < (outputs[3] - 1) * S + K):
        raise ValueError('the shapes of inputs, outputs and argidx do not fit each other, kernel_size and stride')


# ------------------------------------------------------------------------------------------------------------ ReLU

class ReluLayer(object):
    """y = max(0, x), number by number; handbook 2.2.1, lab 1.

    Backward, the gradient passes where x was larger than 0, and in_grad is 0 elsewhere, at exactly 0, too.

    Forward   inputs of any shape, float32 or float64 -> the same shape and dtype; a NaN stays one.
    Backward  out_grad, of the shape of the outputs -> the same shape and dtype.
    State     positive, bool: where the last inputs were larger than 0.
    Errors    as for a convolution.

    >>> layer = ReluLayer()
    >>> layer.forward(np.array([-1., 0., 2.]))
    array([0., 0., 2.])
    >>> layer.backward(np.array([5., 6., 7.]))
    array([0., 0., 7.])
    """

    def __init__(self):
        self.positive = None

    def forward(self, inputs):
        inputs = _numbers('inputs', inputs)
        outputs, self.positive = np.empty_like(inputs), np.empty(inputs.shape, np.bool_)
        self._relu(inputs.reshape(-1), outputs.reshape(-1), self.positive.reshape(-1))
        return outputs

    def backward(self, out_grad):
        in_grad = _numbers('out_grad', out_grad, _forward_first(self.positive).shape)
        if in_grad is out_grad or not isinstance(out_grad, np.ndarray):    # else a copy: a convolution's had a frame
            in_grad = in_grad.copy()
        self._relu_back(in_grad.reshape(-1), self.positive.reshape(-1))
        return in_grad

    @staticmethod
    @jit(nopython=True)
    def _relu(inputs, outputs, positive):
        for p in range(len(inputs)):
            outputs[p] = 0 if inputs[p] <= 0 else inputs[p]
            positive[p] = inputs[p] > 0

    @staticmethod
    @jit(nopython=True)
    def _relu_back(grad, positive):
        for p in range(len(grad)):
            grad[p] = grad[p] if positive[p] else 0


# --------------------------------------------------------------------------------------------------------- flatten

class FlattenLayer(object):
    """Planes as rows of numbers and back, handbook 2.2.1.3 and 2.5.2.3.

        y(n, (c * H + h) * W + w) = x(n, c, h, w)

    Forward   inputs (N, C, H, W), float32 or float64 -> (N, C * H * W), a new array of the same dtype.
    Backward  out_grad (N, C * H * W) -> (N, C, H, W), a new array of the same dtype.
    State     input_shape.
    Errors    as for a convolution.

    >>> FlattenLayer().forward(np.array([[[[1., 2.]], [[3., 4.]]]]))
    array([[1., 2., 3., 4.]])
    """

    def __init__(self):
        self.input_shape = None

    def forward(self, inputs):
        inputs = _numbers('inputs', inputs, (None, None, None, None))
        # (N, C, H, W) -> (N, C * H * W)
        self.input_shape = inputs.shape
        batch, channel, height, width = inputs.shape
        return self._flatten(inputs, np.zeros((batch, channel * height * width), dtype=inputs.dtype))

    def backward(self, grad):
        batch, channel, height, width = _forward_first(self.input_shape)
        grad = _numbers('grad', grad, (batch, channel * height * width))
        return self._unflatten(grad, np.zeros(self.input_shape, dtype=grad.dtype))

    @staticmethod
    @jit(nopython=True)
    def _flatten(inputs, outputs):
        batch, channel, height, width = inputs.shape
        for n in range(batch):
            for c in range(channel):
                for h in range(height):
                    for w in range(width):
                        outputs[n, (c * height + h) * width + w] = inputs[n, c, h, w]
        return outputs

    @staticmethod
    @jit(nopython=True)
    def _unflatten(grad, in_grad):
        batch, channel, height, width = in_grad.shape
        for n in range(batch):
            for c in range(channel):
                for h in range(height):
                    for w in range(width):
                        in_grad[n, c, h, w] = grad[n, (c * height + h) * width + w]
        return in_grad


# ------------------------------------------------------------------------------------------------- fully connected

class FullyConnectLayer(object):
    """Every output from every input, lab 1.

        y(n, o) = bias(o) + sum over i of weight(o, i) * x(n, i)

        in_grad(n, i)     = sum over o of out_grad(n, o) * weight(o, i)
        grad_weight(o, i) = sum over n of out_grad(n, o) * x(n, i)
        grad_bias(o)      = sum over n of out_grad(n, o)

    Forward   inputs (N, in_features), float32 or float64 -> (N, out_features), of the same dtype.
    Backward  out_grad (N, out_features) -> (N, in_features), of the same dtype.
    State     weight (out_features, in_features), bias (out_features,); grad_weight, grad_bias of the last backward,
              computed when they are read: a pass back to the picture alone does not need 100 million of them.
    Errors    as for a convolution.

    >>> layer = FullyConnectLayer(in_features=2, out_features=1)
    >>> layer.load_params(np.array([[1., 10.]]), np.array([100.]))
    >>> layer.forward(np.array([[2., 3.]]))
    array([[132.]])
    >>> layer.backward(np.array([[1.]]))
    array([[ 1., 10.]])
    >>> layer.grad_weight
    array([[2., 3.]])
    """

    weight = DrawnWhenRead()

    def __init__(self, in_features, out_features):
        # 输入、输出各有几个数 / numbers read and numbers written
        self.in_features = _size('in_features', in_features)
        self.out_features = _size('out_features', out_features)
        self.weight = normal(loc=0.0, scale=0.01, size=(self.out_features, self.in_features))
        self.bias = np.zeros([self.out_features])
        # 上一次的输入：一份拷贝，原数组别人可以再写 / the last inputs, a copy: whoever made them may write into theirs
        self.inputs = None
        # 上一次反向传播的输入和梯度，以及由它们算出的参数梯度 / inputs and out_grad of the last backward, and the gradients of
        # the parameters, once they were read
        self.products = None
        self.gradients = None

    def forward(self, inputs):
        inputs = _numbers('inputs', inputs, (None, self.in_features))
        self.inputs = np.array(inputs, order='C')
        outputs = np.zeros((len(inputs), self.out_features), dtype=inputs.dtype)
        return self._connect(self.inputs, outputs, self.weight, self.bias)

    def backward(self, out_grad):
        inputs = _forward_first(self.inputs)
        out_grad = np.array(_numbers('out_grad', out_grad, (len(inputs), self.out_features)), order='C')
        self.products, self.gradients = (inputs, out_grad), None
        return self._connect_back(out_grad, np.zeros((len(inputs), self.in_features), out_grad.dtype), self.weight)

    def load_params(self, weight, bias):
        assert weight.shape == (self.out_features, self.in_features), weight.shape
        assert bias.shape == self.bias.shape, bias.shape
        self.weight, self.bias = _parameter('weight', weight), _parameter('bias', bias)

    def update_params(self, lr):
        """One step of gradient descent, into new arrays of the parameters' dtypes."""
        for name, gradient in (('weight', self.grad_weight), ('bias', self.grad_bias)):
            old = np.ascontiguousarray(getattr(self, name))
            new = np.empty_like(old)
            self._descend(old.reshape(-1), gradient.reshape(-1), lr, new.reshape(-1))
            setattr(self, name, new)

    @property
    def grad_weight(self):
        return self._parameter_gradients()[0]

    @property
    def grad_bias(self):
        return self._parameter_gradients()[1]

    def _parameter_gradients(self):
        if self.gradients is None:
            inputs, out_grad = _forward_first(self.products)
            weight = np.zeros((self.out_features, self.in_features), out_grad.dtype)
            self.gradients = self._connect_grad(out_grad, inputs, weight, np.zeros(self.out_features, out_grad.dtype))
        return self.gradients

    @staticmethod
    @jit(nopython=True)
    def _connect(inputs, outputs, weight, bias):
        for n in range(len(outputs)):
            for o in range(0, outputs.shape[1], 8):
                _connect_eight(o, inputs[n], outputs[n], weight, bias)
        return outputs

    @staticmethod
    @jit(nopython=True)
    def _connect_back(out_grad, in_grad, weight):
        for n in range(len(out_grad)):
            for o in range(out_grad.shape[1]):
                if out_grad[n, o] != 0:    # behind a ReLU many gradients are 0: their rows are not read
                    _add_row(in_grad[n], weight[o], out_grad[n, o])
        return in_grad

    @staticmethod
    @jit(nopython=True, parallel=True)
    def _connect_grad(out_grad, inputs, grad_weight, grad_bias):
        batch, in_features = inputs.shape
        for o in prange(out_grad.shape[1]):
            for n in range(batch):
                grad_bias[o] += out_grad[n, o]
                for i in range(in_features):
                    grad_weight[o, i] += out_grad[n, o] * inputs[n, i]
        return grad_weight, grad_bias

    @staticmethod
    @jit(nopython=True, parallel=True)
    def _descend(parameter, gradient, lr, out):
        for p in prange(len(out)):
            out[p] = parameter[p] - lr * gradient[p]


@jit(nopython=True)
def _connect_eight(o, x, y, weight, bias):
    """Eight outputs side by side, each in the formula's order: one sum alone would wait for each of its additions."""
    last = len(y) - 1    # past the last output again that one
    a, b, c, d = o, min(o + 1, last), min(o + 2, last), min(o + 3, last)
    e, f, g, h = min(o + 4, last), min(o + 5, last), min(o + 6, last), min(o + 7, last)
    wa, wb, wc, wd, we, wf, wg, wh = (weight[a], weight[b], weight[c], weight[d],
                                      weight[e], weight[f], weight[g], weight[h])
    ya, yb, yc, yd, ye, yf, yg, yh = bias[a], bias[b], bias[c], bias[d], bias[e], bias[f], bias[g], bias[h]
    for i in range(len(x)):
        v = x[i]
        ya, yb, yc, yd = ya + wa[i] * v, yb + wb[i] * v, yc + wc[i] * v, yd + wd[i] * v
        ye, yf, yg, yh = ye + we[i] * v, yf + wf[i] * v, yg + wg[i] * v, yh + wh[i] * v
    y[a], y[b], y[c], y[d], y[e], y[f], y[g], y[h] = ya, yb, yc, yd, ye, yf, yg, yh


@jit(nopython=True)
def _add_row(in_grad, row, g):
    for i in range(len(in_grad)):
        in_grad[i] += g * row[i]
