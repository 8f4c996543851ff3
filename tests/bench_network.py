"""The whole network beside torch, for `bench.py --network`: layer by layer, both passes, main.py as a process,
and convolutions with other windows and strides than VGG16's.

The network has random weights and a random input; torch has the same ones.  Forward is float32 on both sides;
backward is float64 on both sides, as the lab's dtypes make it.
"""
import collections
import contextlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time

import numba
import numpy as np

import textbook
from bench import get_num_threads, in_turns, on_one_thread, set_num_threads, torch
from file import memory
from layer import ConvolutionLayer, FullyConnectLayer, MaxPoolLayer
from vgg import VGG16, _count

HERE = os.path.dirname(os.path.abspath(__file__))
PROJECT = os.path.dirname(HERE)
ROUNDS = 10    # of whole passes in each repeat: one of them may take half as long again as the one before
# and what each of them goes through: how fast the cores are changes within seconds, so what is compared is close by
ORDER = ('forward 1', 'backward 1', 'forward', 'backward', 'torch forward', 'torch backward', 'torch forward 1',
         'torch backward 1', 'bare forward', 'bare backward', 'bare forward 1', 'bare backward 1',
         'bare forward 1 beside', 'bare backward 1 beside')


def say(text):
    print(text, file=sys.stderr, flush=True)


def random_network():
    """VGG16 with weights of the size that keeps the numbers of every layer as large as those of the one before."""
    model, rng = VGG16(), np.random.default_rng(0)
    for layer in model.graph_layers.values():
        if hasattr(layer, 'weight_shape'):
            weight = rng.standard_normal(layer.weight_shape, dtype=np.float32)
            weight *= np.float32((2 / (weight[0].size)) ** 0.5)
            layer.load_params(weight, np.zeros(len(weight), np.float32))
    return model, rng.standard_normal((1, 3, 224, 224), dtype=np.float32)


def silent(work):
    """The work with what it prints thrown away, but printed: that is part of the lab's passes."""
    with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere):
        return work()


def twin(model, dtype):
    """The 37 layers in torch, {name: function}, with the weights of the model."""
    from torch_main import network
    return network({name: (torch.from_numpy(layer.weight).to(dtype), torch.from_numpy(layer.bias).to(dtype))
                    for name, layer in model.graph_layers.items() if hasattr(layer, 'weight_shape')})


def spread(times, unit=' s'):
    return '%8.3f%s [%.3f .. %.3f]' % (np.median(times), unit, min(times), max(times))


# ------------------------------------------------------------------------------------------- layer by layer

def layer_table(model, x, repeats):
    """Lines of text: milliseconds of every layer, forward and then backward, and what torch takes.

    Medians with minimum and maximum, and the median of the rounds' ratios.
    """
    layers = model.graph_layers
    outputs, out_grad = {}, np.ones((1, 4))
    for name, layer in layers.items():
        x, outputs[name] = layer.forward(x), x
    times = {}
    float32, float64 = (twin(model, torch.float32), twin(model, torch.float64)) if torch else (None, None)
    for name, layer in reversed(list(layers.items())):
        say('layer by layer: %s' % name)
        x = outputs.pop(name)
        works = {'forward': lambda: layer.forward(x), 'backward': lambda: layer.backward(out_grad)}
        if torch:
            x32, x64 = torch.from_numpy(x), torch.from_numpy(x).double().requires_grad_()
            y64, g64 = float64[name](x64), torch.from_numpy(np.ascontiguousarray(out_grad)).double()
            works['torch forward'] = lambda: float32[name](x32)
            works['torch backward'] = lambda: torch.autograd.grad(y64, x64, g64, retain_graph=True)
        times[name] = {key: 1e3 * np.array(value) for key, value in in_turns(works, 5 * repeats, warm=True).items()}
        out_grad = layer.backward(out_grad)

    rows = [(name, times[name]) for name in layers]
    rows.append(('all', {key: sum(row[key] for _, row in rows) for key in rows[0][1]}))
    lines = []
    for way in ('forward', 'backward'):
        cells = [('milliseconds', ' ' + way, ' torch' if torch else '', ' ratio' if torch else '')]
        for name, row in rows:
            mine, other = row[way], row.get('torch ' + way)
            cells.append((name, spread(mine, ''), spread(other, '') if torch else '',
                          '%6.2f' % np.median(mine / other) if torch else ''))
        lines += [('%-15s %-30s %-30s %s' % some).rstrip() for some in cells] + ['']
    return '\n'.join(lines[:-1])


# -------------------------------------------------------------------------------- other windows and strides

WINDOWS = ((3, 1), (1, 1), (5, 1), (7, 1), (3, 2), (1, 2), (7, 2))    # (kernel_size, stride), VGG16's own first


def window_table(repeats, end='', channels=128, side=56):
    """Lines of text: nanoseconds a thousand multiply-adds take with each window, and how many times VGG16's own.

    `end` is put behind the first line.
    """
    rng, works, operations = np.random.RandomState(0), {}, {}
    x = rng.normal(0, 1, (1, channels, side, side)).astype(np.float32)
    for K, S in WINDOWS:
        layer = ConvolutionLayer(channels, channels, K, K // 2, S)
        layer.load_params(rng.normal(0, 0.01, layer.weight_shape).astype(np.float32), np.zeros(channels, np.float32))
        out_grad = layer.forward(x).astype(np.float64)
        works[K, S, 'forward'] = lambda layer=layer: layer.forward(x)
        works[K, S, 'backward'] = lambda layer=layer, out_grad=out_grad: layer.backward(out_grad)
        operations[K, S] = out_grad.size * channels * K * K / 1e3
    say('other windows and strides')
    each = {key: 1e9 * np.median(times) / operations[key[:2]]
            for key, times in in_turns(works, 5 * repeats, warm=True).items()}    # they take milliseconds
    lines = ['%-15s %9s %9s   %9s %9s%s' % ('ns / 1000 MACs', 'forward', 'to 3, 1', 'backward', 'to 3, 1', end)]
    for K, S in WINDOWS:
        cells = ['K = %d, S = %d' % (K, S)]
        for way in ('forward', 'backward'):
            cells += [each[K, S, way], each[K, S, way] / each[WINDOWS[0] + (way,)]]
        lines.append('%-15s %9.2f %9.2f   %9.2f %9.2f' % tuple(cells))
    return '\n'.join(lines)


# ---------------------------------------------------------------------------------- the rows of whole passes

def row(what, mine, other):
    """A line of text: how many times the other's seconds the first one takes, and both with their extremes.

    Each number of one is set beside the other's of the same round, and the median of these ratios counts: a slow half
    minute of the machine that only one side's median moved to would be no property of the work.
    """
    return '%7.2f  %-52s %s  /  %s' % (np.median(np.divide(mine, other)), what, spread(mine), spread(other))


def to_and_fro(network, ready, busy):
    """Go through the layers of network() and back on one thread, without prints, as long as busy is set.

    Ends where the process that started it has gone: stopped from outside, that one may not have ended this one.
    """
    parent = os.getppid()
    set_num_threads(1)
    memory.keep_what_is_freed()
    model, x = network()
    layers = list(model.graph_layers.values())

    def once(wait):
        y = x
        for layer in layers:
            wait()
            y = layer.forward(y)
        y = np.ones(y.shape)
        for layer in reversed(layers):
            wait()
            y = layer.backward(y)

    def told():
        there = False
        while not there:
            there = busy.wait(1)
            if os.getppid() != parent:
                sys.exit()

    once(lambda: None)    # what has to be compiled is, then
    ready.set()
    while True:
        once(told)


@contextlib.contextmanager
def neighbour(network):
    """An event: while it is set, another process makes passes, and shares nothing but the machine.

    None if that process ended before it was ready; if it does so later, standard error says that its row is none.
    """
    spawn = multiprocessing.get_context('spawn')
    ready, busy = spawn.Event(), spawn.Event()
    other = spawn.Process(target=to_and_fro, args=(network, ready, busy), daemon=True)
    other.start()
    try:
        while other.is_alive() and not ready.wait(0.1):
            pass
        if not other.is_alive():
            say('without a second process: it ended with status %s' % other.exitcode)
            busy = None
        yield busy
        if busy is not None and not other.is_alive():
            say('the second process ended too early, with status %s: do not trust its row' % other.exitcode)
    finally:
        other.terminate()
        other.join()


def while_busy(work, busy):
    """The work with the neighbour at its own meanwhile."""
    def run():
        busy.set()
        try:
            return work()
        finally:
            busy.clear()
    return run


def on_first(cores, work):
    """The work on the first of the cores, where there are any; threads that it starts would have to stay there."""
    def run():
        if not cores:
            return work()
        everywhere = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {cores[0]})
        try:
            return work()
        finally:
            os.sched_setaffinity(0, everywhere)
    return run


def of_average_speed(times, count):
    """Seconds at the average speed of each `count` rounds; one thread has been on all of so many cores then."""
    count = max(1, min(count, len(times)))
    turns = np.reshape(times[:len(times) // count * count], (-1, count))
    return count / (1 / turns).sum(axis=1)


def passes(model, x, repeats, end='', all_rows=True, busy=None):
    """Lines of text about the whole forward and backward pass, taking turns with torch.

    `end` is put behind their names.  all_rows: beside the textbook and one thread, too.  How much a second one helps
    depends on the machine: torch is set beside its own one thread as well, and two processes at once, where there is a
    neighbour that can be `busy`, beside one of them that does the work of both.  The sums that our passes print are
    numpy's, on one thread either way, so there is a row without them; the textbook's loops print nothing, so their row
    is without them, too, and one with them follows.  The textbook's passes take a hundred times as long and are not
    repeated as often.

    One core may be slower than another, by nature or because somebody else's work shares it, and the operating system
    leaves one thread where it is.  Two threads have both: one is sent to each of them in turn, round by round, and set
    beside what the others took in the same rounds.
    """
    out_grad, layers = np.ones((1, 4)), list(model.graph_layers.values())
    cores = collections.deque(sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else ())

    def through(steps, y):
        for step in steps:
            y = step(y)
        return y

    works = {'forward': lambda: silent(lambda: model.forward(x)),
             'backward': lambda: silent(lambda: model.backward(out_grad))}
    if torch:
        float32, float64 = (list(twin(model, dtype).values()) for dtype in (torch.float32, torch.float64))
        x64 = torch.from_numpy(x).double().requires_grad_()
        y64, g64 = through(float64, x64), torch.from_numpy(out_grad).double()
        works['torch forward'] = lambda: through(float32, torch.from_numpy(x))
        works['torch backward'] = lambda: torch.autograd.grad(y64, x64, g64, retain_graph=True)
    if all_rows:
        works['bare forward'] = lambda: through([layer.forward for layer in layers], x)
        works['bare backward'] = lambda: through([layer.backward for layer in reversed(layers)], out_grad)
    if get_num_threads() > 1 and all_rows:
        for name, work in list(works.items()):
            theirs = (torch.get_num_threads, torch.set_num_threads) if name.startswith('torch') else ()
            works[name + ' 1'] = on_first(cores, on_one_thread(work, *theirs))
        if busy is not None:
            for way in ('forward', 'backward'):
                works['bare %s 1 beside' % way] = while_busy(works['bare %s 1' % way], busy)
    works = {name: works[name] for name in sorted(works, key=ORDER.index)}
    plain, times, lines = [], {name: [] for name in works}, []
    for _ in range(repeats):
        if all_rows:
            say('the textbook: a minute or two')
            plain += ROUNDS * [textbook_passes(model, x, out_grad)[2]]    # beside each of the rounds that follow
        say('whole passes')
        for _ in range(ROUNDS):
            for name, seconds in in_turns(works, 1, warm=True).items():
                times[name] += seconds
            cores.rotate(-1)
    if torch:
        lines += [row('forward with prints / torch float32' + end, times['forward'], times['torch forward']),
                  row('backward / torch float64' + end, times['backward'], times['torch backward'])]
    if not all_rows:
        return '\n'.join(lines)

    def both_of(name, some=''):
        return np.add(times[name + 'forward' + some], times[name + 'backward' + some])

    def on_all_cores(name, some=''):
        return of_average_speed(both_of(name, some), len(cores))

    lines += [row('textbook / ours, without prints' + end, plain, both_of('bare ')),
              row('textbook / ours, with prints' + end, plain, both_of(''))]
    for whose, name in (('both passes', ''), ('without prints', 'bare '), ("torch's passes", 'torch ')):
        if name + 'forward 1' in times:
            lines.append(row('one thread / %d threads, %s%s' % (get_num_threads(), whose, end),
                             on_all_cores(name, ' 1'), on_all_cores(name)))
    if 'bare forward 1 beside' in times:
        lines.append(row('one process twice / two at once' + end, 2 * on_all_cores('bare ', ' 1'),
                         on_all_cores('bare ', ' 1 beside')))
    return '\n'.join(lines)


def textbook_passes(model, x, out_grad):
    """(logits, gradient of x, seconds) of a forward and a backward pass with the textbook's loops, every layer whole.

    Seconds are those in the textbook's loops alone.  For ReLU and flatten it has none: the model's layers do these.
    """
    seconds, shapes, argidx = [], {}, {}

    def timed(formula, *arguments):
        formula.compile(tuple(numba.typeof(argument) for argument in arguments))    # if it is not yet
        start = time.perf_counter()
        result = formula(*arguments)
        seconds.append(time.perf_counter() - start)
        return result

    for name, layer in model.graph_layers.items():
        shapes[name] = x.shape
        y = np.empty(x.shape[:1] + _count(layer, x.shape[1:])[1], x.dtype)
        if isinstance(layer, ConvolutionLayer):
            P = layer.padding
            x = np.pad(x, ((0, 0), (0, 0), (P, P), (P, P)), mode='constant')
            x = timed(textbook.conv, x, y, layer.weight, layer.bias, layer.kernel_size, layer.stride)
        elif isinstance(layer, MaxPoolLayer):
            x, argidx[name] = timed(textbook.pool, y, x, np.empty(y.shape, np.int32), layer.kernel_size, layer.stride)
        elif isinstance(layer, FullyConnectLayer):
            x = timed(textbook.fully_connect, x, y, layer.weight, layer.bias)
        else:
            x = layer.forward(x)
    for name, layer in reversed(list(model.graph_layers.items())):
        if isinstance(layer, ConvolutionLayer):
            P, (batch, channels, height, width) = layer.padding, shapes[name]
            in_grad = np.zeros((batch, channels, height + 2 * P, width + 2 * P))
            timed(textbook.conv_back, out_grad, in_grad, layer.weight, layer.kernel_size, layer.stride)
            out_grad = np.ascontiguousarray(in_grad[:, :, P:P + height, P:P + width])
        elif isinstance(layer, MaxPoolLayer):
            out_grad = timed(textbook.pool_back, out_grad, np.zeros(shapes[name]), argidx[name], layer.kernel_size,
                             layer.stride)
        elif isinstance(layer, FullyConnectLayer):
            out_grad = timed(textbook.fully_connect_back, out_grad, np.zeros(shapes[name]), layer.weight)
        else:
            out_grad = layer.backward(out_grad)
    return x, out_grad, sum(seconds)


# ------------------------------------------------------------------------------------- main.py as a process

def process(command):
    """(seconds from start to exit, peak resident bytes) of a command; RuntimeError with its last line if it fails."""
    with tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = status
        if status:
            errors.seek(0)
            lines = errors.read().decode(errors='replace').strip().splitlines() or ['exit status %d' % status]
            raise RuntimeError('%s failed: %s' % (os.path.basename(command[1]), lines[-1]))
    return seconds, usage.ru_maxrss * 1024    # KiB on Linux


def first_run(arguments, once=True):
    """Seconds and bytes of main.py in a fresh copy of the project: kernels to compile, checkpoint to expand.

    Without `once` numba compiles in its own way, not in that of file/once.py.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = os.path.join(folder, 'copy')
        shutil.copytree(PROJECT, copy, ignore=shutil.ignore_patterns('.*', '__pycache__', 'tests', 'vgg16_ckpt.npy'))
        if not once:
            with open(os.path.join(copy, 'file', 'once.py'), 'w') as file:
                file.write('def compile_once():\n    pass\n')
        return process([sys.executable, os.path.join(copy, 'main.py')] + arguments)


def script(repeats, ckpt):
    """Lines of text about main.py, from the start of the process to its end."""
    arguments = ['--ckpt', ckpt] if ckpt else []
    ours = [sys.executable, os.path.join(PROJECT, 'main.py')] + arguments
    theirs = [sys.executable, os.path.join(HERE, 'torch_main.py')]
    theirs += [os.path.join(PROJECT, 'file', 'tulips_demo.jpg'), ckpt] if ckpt else []
    say('main.py')
    process(ours)
    runs, torch_runs, first_runs, slow_runs = [], [], [], []
    for _ in range(repeats):
        runs.append(process(ours))
        if torch:
            torch_runs.append(process(theirs))
        first_runs.append(first_run(arguments))
        slow_runs.append(first_run(arguments, once=False))
    seconds = [run[0] for run in runs]
    lines = []
    if torch:
        lines.append(row('main.py, second run / the same in torch', seconds, [run[0] for run in torch_runs]))
    else:
        lines.append('         %-52s %s' % ('main.py, second run', spread(seconds)))
    lines.append(row('main.py, first run / the same without file/once.py', [run[0] for run in first_runs],
                     [run[0] for run in slow_runs]))
    resident = '%8.2f GB, first run %.2f GB' % tuple(max(run[1] for run in some) * 1e-9 for some in (runs, first_runs))
    if torch:
        resident += '  /  %.2f GB in torch' % (max(run[1] for run in torch_runs) * 1e-9)
    lines.append('         %-52s %s' % ('main.py, most memory resident', resident))
    return '\n'.join(lines)


def report(repeats, ckpt):
    """Print all of it."""
    try:
        processes = script(repeats, ckpt)    # first: Linux counts the memory of a parent as its children's
    except RuntimeError as error:
        processes = '         main.py is left out: %s' % error
    model, x = random_network()
    whole, layers = [], layer_table(model, x, repeats)
    if torch:
        whole.append(passes(model, x, repeats, all_rows=False))
    # as main.py does, and last: it cannot be undone
    kept = ', memory kept' if memory.keep_what_is_freed() else ''
    with neighbour(random_network) if get_num_threads() > 1 else contextlib.nullcontext() as busy:
        whole.append(passes(model, x, repeats, kept, busy=busy))
    windows = window_table(repeats, kept)
    print('%s\n%s\n\n%s\n\n%s' % ('\n'.join(whole), processes, layers, windows))
