"""Time the rungs of tests/ladder.py, from the textbook's loops to those of layer.py, beside torch if there is one.

    python tests/bench.py                        an early layer, a late one and a pooling, forward and backward
    python tests/bench.py --layer layer3_conv2   one layer of VGG16; can be given several times
    python tests/bench.py --plot ladder.png      the same as a picture
    python tests/bench.py --network              all 37 layers, main.py from start to exit, other windows

Every rung is compared with the textbook before it is timed.  What the machine can do is measured in the same run.
"""
import argparse
import collections
import os
import sys
import time

import numba
import numpy as np
from numba import get_num_threads, set_num_threads

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import ladder                                # noqa: E402
import textbook                              # noqa: E402
from file import once, picture               # noqa: E402
from layer import MaxPoolLayer               # noqa: E402
from vgg import VGG16, _count                # noqa: E402

try:
    import torch
except ImportError:
    torch = None
else:
    torch.set_num_threads(get_num_threads())

Machine = collections.namedtuple('Machine', 'float32 float64 bandwidth')    # multiply-adds and bytes a second


def machine():
    """The most that all threads reach together: in a good moment, of many, as neighbours take their part of others."""
    peaks = []
    for dtype in (np.float32, np.float64):
        x, half, rounds = np.ones((4 * get_num_threads(), 4 * ladder.QUARTER), dtype), dtype(0.5), 2000
        ladder.compute(x, half, half, 1)
        times = in_turns({'': lambda: ladder.compute(x, half, half, rounds)}, 200)['']
        peaks.append(x.size * 16 * rounds / min(times))
    x = np.ones(2**25, np.float32)
    y = np.empty_like(x)
    ladder.stream(x, y, np.float32(0.5))
    times = in_turns({'': lambda: ladder.stream(x, y, np.float32(0.5))}, 50)['']
    return Machine(peaks[0], peaks[1], 2 * x.nbytes / min(times))


# ---------------------------------------------------------------------------------- measuring and comparing

def in_turns(works, repeats, warm=False):
    """Seconds of each piece of work, `repeats` rounds: a slow moment of the machine meets all of them alike.

    warm: each is done once more, just before, untimed.  For some milliseconds after its work, a thread of numba's or
    torch's keeps its core and looks for more: to what is timed next, of the other's, that would be most of a short
    layer's time.
    """
    times = collections.OrderedDict((name, []) for name in works)
    for _ in range(repeats):
        for name, work in works.items():
            if warm:
                work()
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
    return times


def on_one_thread(work, get=get_num_threads, put=set_num_threads):
    """The work with numba's threads reduced to one meanwhile; get and put are others' functions for that."""
    def run():
        threads = get()
        put(1)
        try:
            return work()
        finally:
            put(threads)
    return run


# rungs: {name: function that returns a list of results}, the textbook first, and that only for the channels `picked`,
# which are the `part` of all.  buffers: what the rungs write to.  The machine does `peak` units of `work` a second.
Ladder = collections.namedtuple('Ladder', 'title about rungs picked part buffers work unit peak')
TEXTBOOK = 'textbook order'
DEFAULT = ('layer1_conv2', 'layer1_maxpool', 'layer5_conv3')


def check(steps):
    """Compile and run every rung once; SystemExit names one whose numbers are not the textbook's."""
    expected = None
    for name, run in steps.rungs.items():
        for buffer in steps.buffers:
            buffer.fill(-1)
        results = run()
        if expected is None:
            expected = [result.copy() for result in results]
        for result, right in zip(results, expected):
            result = result if name == TEXTBOOK else result[steps.picked]
            difference = np.abs(result - right).max()
            limit = np.abs(right).max() * (1e-5 if right.dtype == np.float32 else 1e-12)
            if not difference <= limit:
                sys.exit('%s: "%s" differs from the textbook by %g, more than rounding explains (%g)' % (
                    steps.title, name, difference, limit))


def measure(steps, repeats):
    """{rung: median seconds}; the textbook's are scaled up to all channels."""
    medians = collections.OrderedDict(
        (name, float(np.median(times))) for name, times in in_turns(steps.rungs, repeats).items())
    medians[TEXTBOOK] /= steps.part
    return medians


def convolution_rungs(plain, x, y, weight, bias, ours):
    return collections.OrderedDict([
        (TEXTBOOK, plain),
        ('loop order', lambda: [ladder.loop_order(x, y, weight, bias)]),
        ('four channels', lambda: [ladder.four_channels(x, y, weight, bias)]),
        ('tiles in cache', on_one_thread(lambda: [ladder.tiles(x, y, weight, bias, False)])),
        ('four taps', on_one_thread(lambda: [ladder.tiles(x, y, weight, bias, True)])),
        ('threads', lambda: [ladder.tiles(x, y, weight, bias, True)]),
        ('layer.py', ours)])


def convolution_ladders(name, layer, shape, peaks, channels):
    """Forward in float32 and backward in float64, as the lab's dtypes have it; `channels` for the textbook.

    Backward it takes longer for a channel among all of them: here the few sums that it goes to and fro between stay in
    the fastest cache.  bench_network.py times it whole.
    """
    K, P, rng = layer.kernel_size, layer.padding, np.random.RandomState(0)
    plane, (ins, outs) = shape[1:], (shape[0], layer.out_channels)
    weight = rng.normal(0, (2 / (ins * K * K)) ** 0.5, layer.weight_shape).astype(np.float32)
    layer.load_params(weight, rng.normal(0, 1, outs).astype(np.float32))
    x, y = rng.normal(0, 1, shape).astype(np.float32), np.empty((outs,) + plane, np.float32)
    x_pad = np.pad(x, ((0, 0), (P, P), (P, P)), mode='constant')
    some = np.unique(np.linspace(0, outs - 1, channels).astype(int))
    some_weight, some_bias, some_y = weight[some], layer.bias[some], np.empty((1, len(some)) + plane, np.float32)
    forward = convolution_rungs(lambda: textbook.conv(x_pad[None], some_y, some_weight, some_bias, K, 1),
                                x_pad, y, weight, layer.bias, lambda: [layer.forward(x[None])[0]])

    frame = K - 1 - P
    g, in_grad = rng.normal(0, 1, y.shape), np.empty(shape)
    g_pad = np.pad(g, ((0, 0), (frame, frame), (frame, frame)), mode='constant')
    turned = np.ascontiguousarray(weight.transpose(1, 0, 2, 3)[:, :, ::-1, ::-1]).astype(np.float64)
    few = np.unique(np.linspace(0, ins - 1, channels).astype(int))
    few_weight = np.ascontiguousarray(weight[:, few])
    few_grad = np.empty((1, len(few)) + x_pad.shape[1:])

    def plain_back():
        few_grad.fill(0)
        textbook.conv_back(g[None], few_grad, few_weight, K, 1)
        return few_grad[:, :, P:P + plane[0], P:P + plane[1]]

    backward = convolution_rungs(plain_back, g_pad, in_grad, turned, np.zeros(ins),
                                 lambda: [layer.backward(g[None])[0]])
    layer.forward(x[None])    # its backward needs one
    if torch:
        t = [torch.from_numpy(array) for array in (x[None], weight, layer.bias, g[None], weight.astype(np.float64))]
        forward['torch'] = lambda: torch.nn.functional.conv2d(t[0], t[1], t[2], padding=P).numpy()
        backward['torch'] = lambda: torch.nn.grad.conv2d_input((1,) + shape, t[4], t[3], padding=P).numpy()

    about = '%d -> %d planes of %d x %d' % ((ins, outs) + plane)
    flops = 2 * weight.size * plane[0] * plane[1]
    return [Ladder(name + ' forward, float32', about, forward, some, len(some) / outs, (y, some_y),
                   flops, 'GFLOP/s', 2 * peaks.float32),
            Ladder(name + ' backward, float64', about, backward, few, len(few) / ins, (in_grad, few_grad),
                   flops, 'GFLOP/s', 2 * peaks.float64)]


def pooling_ladders(name, layer, shape, peaks):
    """Forward in float32 and backward in float64; the work is the memory that is read and written."""
    rng, small = np.random.RandomState(0), (shape[0], shape[1] // 2, shape[2] // 2)
    x, y, argidx = rng.normal(0, 1, shape).astype(np.float32), np.empty(small, np.float32), np.empty(small, np.int32)
    g, in_grad = rng.normal(0, 1, small), np.empty(shape)

    def plain():
        return [result[0] for result in textbook.pool(y[None], x[None], argidx[None], 2, 2)]

    def rows():
        return [ladder.row_by_row(y, x, argidx), argidx]

    def ours():
        return [layer.forward(x[None])[0], layer.argidx[0]]

    def plain_back():
        in_grad.fill(0)
        return [textbook.pool_back(g[None], in_grad[None], layer.argidx, 2, 2)[0]]

    def once():
        return [ladder.every_number_once(g, in_grad, layer.argidx[0])]

    forward = collections.OrderedDict([(TEXTBOOK, plain), ('without jumps', on_one_thread(rows)), ('threads', rows),
                                       ('layer.py', ours)])
    backward = collections.OrderedDict([(TEXTBOOK, plain_back), ('written once', on_one_thread(once)),
                                        ('threads', once), ('layer.py', lambda: [layer.backward(g[None])[0]])])
    if torch:
        x_torch, x64, g_torch = torch.from_numpy(x[None]), torch.from_numpy(x[None]).double(), torch.from_numpy(g[None])
        pool = torch.nn.functional.max_pool2d
        y64 = pool(x64.requires_grad_(), 2)
        forward['torch'] = lambda: [pool(x_torch, 2, return_indices=True)[0][0].numpy()]
        backward['torch'] = lambda: [torch.autograd.grad(y64, x64, g_torch, retain_graph=True)[0][0].numpy()]
    layer.forward(x[None])    # backward needs its argidx
    about, everything = '%d planes of %d x %d' % shape, np.arange(shape[0])
    return [Ladder(name + ' forward, float32', about, forward, everything, 1, (y, argidx),
                   x.nbytes + y.nbytes + argidx.nbytes, 'GB/s', peaks.bandwidth),
            Ladder(name + ' backward, float64', about, backward, everything, 1, (in_grad,),
                   g.nbytes + in_grad.nbytes + argidx.nbytes, 'GB/s', peaks.bandwidth)]


# -------------------------------------------------------------------------------------------- the command

def ladders_of(names, peaks):
    """The two ladders, forward and backward, of each layer that is named; the textbook does four channels."""
    shape = (3, 224, 224)
    for name, layer in VGG16().graph_layers.items():
        if name in names:
            if isinstance(layer, MaxPoolLayer):
                pair = pooling_ladders(name, layer, shape, peaks)
            else:
                pair = convolution_ladders(name, layer, shape, peaks, 4)
            yield from pair
        shape = _count(layer, shape)[1]


def table(steps, medians):
    """A ladder's lines of text."""
    lines = ['%s: %s' % (steps.title, steps.about),
             '  %-16s %10s %10s %10s %12s' % ('', 'seconds', steps.unit, 'of peak', 'textbook / it')]
    for name, seconds in medians.items():
        lines.append('  %-16s %10.5f %10.1f %8.1f %% %12.1f' % (
            name, seconds, steps.work / seconds / 1e9, 100 * steps.work / seconds / steps.peak,
            medians[TEXTBOOK] / seconds))
    return '\n'.join(lines)


def drawn(results, note):
    """The ladders as a picture, two beside each other: a bar a rung, as long as its share of the machine's peak."""
    width, margin, line, column, label, bar = 1800, 120, 44, 810, 216, 270
    top = 260
    page = np.full((top + sum(len(medians) * line + 150 for _, medians in results[::2]), width, 3), picture.PAPER,
                   np.uint8)
    picture.text(page, 'From the textbook to layer.py', margin - 2, 130, 40, bold=True)
    picture.text(page, note, margin, 178, picture.SMALL, picture.GREY)
    for k, (steps, medians) in enumerate(results):
        left = margin + k % 2 * column
        picture.text(page, steps.title, left, top, picture.MEDIUM, bold=True)
        picture.text(page, steps.about, left, top + 36, picture.SMALL - 2, picture.GREY)
        for place, (name, seconds) in enumerate(medians.items()):
            y = top + 82 + place * line
            colour = {'layer.py': picture.RED, 'torch': picture.GREY}.get(name, picture.INK)
            x, share = left + label, min(1, steps.work / seconds / steps.peak)
            page[y - 17:y + 1, x:x + bar] = picture.PALE
            page[y - 17:y + 1, x:x + int(round(bar * share))] = colour
            picture.text(page, name, left, y, picture.SMALL, colour)
            picture.text(page, '%.4f s' % seconds, x + bar + 150, y, picture.SMALL, colour, right=True)
            picture.text(page, '%.0f x' % (medians[TEXTBOOK] / seconds), left + column - 60, y, picture.SMALL, colour,
                         right=True)
        if k % 2:
            top += len(medians) * line + 150
    return page


def main():
    layers = [name for name in VGG16().graph_layers if 'conv' in name or 'maxpool' in name]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--layer', action='append', choices=layers, metavar='NAME', help='one of ' + ', '.join(layers))
    parser.add_argument('--network', action='store_true', help='the whole network instead')
    parser.add_argument('--plot', metavar='FILE', help='also draw the ladders into this file')
    parser.add_argument('--repeats', type=int, default=3, help='rounds of measuring (default 3)')
    parser.add_argument('--ckpt', metavar='PATH', help='checkpoint for the script of --network (default: as main.py)')
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error('--repeats: at least 1')
    if arguments.plot:
        try:
            picture.check_path(arguments.plot)
        except ValueError as error:
            parser.error('--plot %s' % error)
    print('Python %s, numpy %s, numba %s, torch %s, threads: %d' % (
        sys.version.split()[0], np.__version__, numba.__version__, torch.__version__ if torch else 'not installed',
        get_num_threads()))
    if arguments.network:
        from bench_network import report
        return report(arguments.repeats, arguments.ckpt)
    peaks = machine()
    peak = '%.0f GFLOP/s in float32, %.0f in float64, %.1f GB/s' % (
        peaks.float32 * 2e-9, peaks.float64 * 2e-9, peaks.bandwidth * 1e-9)
    print('Peak of this run: %s.  Medians of %d rounds; the textbook on some channels, scaled up.' % (
        peak, arguments.repeats))
    results = []
    for steps in ladders_of(arguments.layer or DEFAULT, peaks):
        print('%s: compiling and checking' % steps.title, file=sys.stderr)
        check(steps)
        results.append((steps, measure(steps, arguments.repeats)))
        print('\n' + table(*results[-1]), flush=True)
    if arguments.plot:
        note = 'Full bar: %s. Right: seconds, and times as fast as the textbook.' % peak
        picture.write(arguments.plot, drawn(results, note))


if __name__ == '__main__':
    once.compile_once()
    main()
