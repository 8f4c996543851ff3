"""Measure this package, beside torch where that is installed, and the rungs of tests/ladder.py.

    python tests/bench.py               print it all: some minutes, on a machine that has nothing else to do
    python tests/bench.py --report      and write it to tests/measured.md, in the place of what this Python had there
    python tests/bench.py --readme      print README's tables out of tests/measured.md; measures nothing

What is compared takes turns in one process; main.py and the script in torch take turns as processes.  A number is the
median of the turns, with the least and the largest; a ratio is one of each turn.
"""
import argparse
import contextlib
import os
import platform
import re
import subprocess
import sys
import tempfile
import time

import llvmlite.binding
import numba
import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
PROJECT = os.path.dirname(HERE)
sys.path[:0] = [PROJECT, HERE]
import ladder                                                               # noqa: E402
import main                                                                 # noqa: E402
import network                                                              # noqa: E402
from layer import ConvolutionLayer, FullyConnectLayer                       # noqa: E402
from loss import CrossEntropy                                               # noqa: E402
from vgg import VGG16, count                                                # noqa: E402

try:
    import torch
    import torch_main
except ImportError:
    torch = None

MEASURED = os.path.join(HERE, 'measured.md')
TITLE = '# Measured\n\nWritten by `python tests/bench.py --report`: a section of each Python that ran it.\n\n'
BEGIN, END = '<!-- measured -->', '<!-- /measured -->'    # around README's tables
WINDOWS = (3, 1), (1, 1), (5, 1), (7, 1), (3, 2), (1, 2), (7, 2)    # (kernel_size, stride), VGG16's own first


def say(text):
    print(text, file=sys.stderr, flush=True)


def in_turns(works, turns):
    """{name: seconds of each turn} of {name: work}.

    What is short is done once before, untimed: for some milliseconds after its work, a thread of numba's or torch's
    keeps its core and looks for more.
    """
    times = {name: [] for name in works}
    for _ in range(turns):
        for name, work in works.items():
            if not times[name] or times[name][-1] < 0.5:
                work()
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
    return {name: np.array(seconds) for name, seconds in times.items()}


def one_thread(work):
    """The work, with one thread of numba's."""
    def run():
        threads = numba.get_num_threads()
        numba.set_num_threads(1)
        try:
            return work()
        finally:
            numba.set_num_threads(threads)
    return run


def cell(values, form='%.1f', unit=''):
    return '%s%s [%s .. %s]' % (form % np.median(values), unit, form % min(values), form % max(values))


def row(what, values, form, unit, note):
    return [what, cell(values, form, unit), note]


def ratio(what, mine, other):
    return row(what, mine / other, '%.2f', '', '%.3f s / %.3f s' % (np.median(mine), np.median(other)))


def table(*rows):
    """Markdown of rows of cells, the heads first."""
    rows = [rows[0], ['---'] + ['---:'] * (len(rows[0]) - 1)] + list(rows[1:])
    return ''.join('| %s |\n' % ' | '.join(cells) for cells in rows)


# ------------------------------------------------------------------------------- convolutions beside the peak

def convolutions(layers, turns, rounds=2000):
    """(rows for the summary, rows of all layers): on one thread, as a share of the multiply-adds that it can do.

    layers: list of (name, ConvolutionLayer, shape of its input).
    """
    ways = {'forward float32': np.float32, 'backward float64': np.float64, 'forward float64': np.float64}
    loop = {dtype: (np.ones(4 * ladder.QUARTER, dtype), dtype(0.5)) for dtype in (np.float32, np.float64)}
    rng, times, names = np.random.RandomState(0), [], []
    for name, layer, shape in layers:
        say(name)
        layer.load_params(*parameters(rng, layer.out_channels, layer.in_channels, layer.kernel_size))
        x = rng.normal(0, 1, (1,) + shape)
        x32, out_grad = x.astype(np.float32), layer.forward(x)
        works = {'forward float32': lambda: layer.forward(x32), 'forward float64': lambda: layer.forward(x),
                 'backward float64': lambda: layer.backward(out_grad)}
        works.update((dtype, lambda x=x, half=half: ladder.compute(x, half, half, rounds))
                     for dtype, (x, half) in loop.items())
        times.append(in_turns({way: one_thread(work) for way, work in works.items()}, turns))
        names.append('%s, %d -> %d, %d x %d' % (name, layer.in_channels, layer.out_channels, shape[1], shape[2]))
    speeds = {dtype: 16 * rounds * 4 * ladder.QUARTER / np.array([some[dtype] for some in times]) for dtype in loop}
    shares = {way: np.array([count(layer, shape)[2] / some[way] for (_, layer, shape), some in zip(layers, times)])
              * 100 / speeds[dtype].max() for way, dtype in ways.items()}
    large = [shape[1] >= 28 and shape[0] != 3 for _, _, shape in layers]
    summary = [row('multiply-add loop on one thread, %s' % dtype.__name__, 2e-9 * speed.max(axis=1), '%.0f', ' GFLOP/s',
                   'beside each layer; the largest is the peak') for dtype, speed in speeds.items()]
    summary += [row('3x3 convolutions, share of the peak, %s' % way, share[large].mean(axis=0), '%.0f', ' %',
                    'one thread; mean over those of 28x28 and larger that read more than a picture') for way, share in shares.items()]
    heads = ['one thread, % of its peak'] + list(ways)
    return summary, [heads] + [[name] + [cell(shares[way][k], '%.0f') for way in ways] for k, name in enumerate(names)]


def convolutions_of(model, shape=(3, 224, 224)):
    for name, layer in model.graph_layers.items():
        if isinstance(layer, ConvolutionLayer):
            yield name, layer, shape
        shape = count(layer, shape)[0]


def parameters(rng, outs, ins, K):
    """A weight that keeps numbers as large as they are, and a bias."""
    return rng.normal(0, (ins * K * K) ** -0.5, (outs, ins, K, K)).astype('f4'), rng.normal(0, 1, outs).astype('f4')


def windows(turns, channels=128, side=56):
    """Rows: what a thousand multiply-adds take with other windows and strides than VGG16's."""
    rng, works, macs = np.random.RandomState(0), {}, {}
    x = rng.normal(0, 1, (1, channels, side, side)).astype(np.float32)
    for K, S in WINDOWS:
        layer = ConvolutionLayer(channels, channels, K, K // 2, S)
        layer.load_params(*parameters(rng, channels, channels, K))
        out_grad, macs[K, S] = layer.forward(x).astype(np.float64), count(layer, x.shape[1:])[2]
        works[K, S, 'forward'] = lambda layer=layer: layer.forward(x)
        works[K, S, 'backward'] = lambda layer=layer, out_grad=out_grad: layer.backward(out_grad)
    say('other windows')
    each = {key: 1e12 * times / macs[key[:2]] for key, times in in_turns(works, turns).items()}
    rows = [['ns for 1000 multiply-adds', 'forward float32', 'to 3, 1', 'backward float64', 'to 3, 1']]
    for K, S in WINDOWS:
        rows.append(['K = %d, S = %d' % (K, S)])
        for way in 'forward', 'backward':
            own = each[WINDOWS[0] + (way,)]
            rows[-1] += [cell(each[K, S, way], '%.2f'), '%.2f' % np.median(each[K, S, way] / own)]
    return rows


# -------------------------------------------------------------------------------------------------- the ladder

def climb(rungs, out, turns, loose=()):
    """{rung: seconds} of {rung: work that writes to out, or returns another array}, the textbook first.

    SystemExit names a rung that is not the textbook's: to the bit, but for the `loose`, where sums have other orders.
    """
    right = None
    for name, work in rungs.items():
        say(name)
        out.fill(0)
        found = np.array(work())
        right = found if right is None else right
        error, limit = np.abs(found - right).max(), 1e-5 if out.dtype == np.float32 else 1e-12
        if not error <= (limit * np.abs(right).max() if name in loose else 0):
            sys.exit('%s differs from the textbook by %g' % (name, error))
    return in_turns(rungs, turns)


def rows_of_rungs(title, forward, backward):
    rows = [[title, 'forward float32, ms', 'times', 'backward float64, ms', 'times']]
    for name in forward:
        rows.append([name])
        for times in forward, backward:
            rows[-1] += [cell(1e3 * times[name]), '%.3g' % (np.median(times['textbook']) / np.median(times[name]))] if (
                name in times) else ['', '']
    return rows


def cleared(work, out, *arguments):
    """The work of a function that adds to out."""
    return lambda: (out.fill(0), work(*arguments))[1]


def convolution_ladder(turns, channels=256, side=56):
    """(rows, seconds forward) of all rungs, at a layer in the midst of VGG16."""
    rng, loose = np.random.RandomState(0), ('Winograd', 'torch')
    x, g = rng.normal(0, 1, (1, channels, side + 2, side + 2)).astype('f4'), rng.normal(0, 1, (1, channels, side, side))
    weight, bias = parameters(rng, channels, channels, 3)
    y, in_grad, (framed, turned, nothing) = np.empty(g.shape, 'f4'), np.empty(x.shape), ladder.turned(g, weight)
    forward = {name: lambda rung=rung: rung(x, y, weight, bias, 3, 1) for name, rung in ladder.RUNGS.items()}
    backward = {name: lambda rung=rung: rung(framed, in_grad, turned, nothing, 3, 1)
                for name, rung in ladder.RUNGS.items() if name != 'Winograd'}
    for name, back in (('textbook', ladder.textbook.conv_back), (ladder.LAYER, ConvolutionLayer._conv_back)):
        backward[name] = cleared(back, in_grad, g, in_grad, weight, 3, 1)
    if torch:
        tx, tw, tb, tg = (torch.from_numpy(array) for array in (x, weight, bias, g))
        forward['torch'] = lambda: torch.nn.functional.conv2d(tx, tw, tb).numpy()
        backward['torch'] = lambda tw=tw.double(): torch.nn.grad.conv2d_input(x.shape, tw, tg).numpy()
    forward, backward = climb(forward, y, turns, loose), climb(backward, in_grad, turns, loose)
    return rows_of_rungs('%d -> %d, %d x %d' % (channels, channels, side, side), forward, backward), forward


def pooling_ladder(turns, channels=64, side=224):
    rng, small = np.random.RandomState(0), (1, channels, side // 2, side // 2)
    x, g = rng.normal(0, 1, (1, channels, side, side)).astype('f4'), rng.normal(0, 1, small)
    y, argidx, in_grad = np.empty(small, 'f4'), np.empty(small, np.int32), np.empty(x.shape)
    forward = {name: lambda pool=pool: pool(y, x, argidx, 2, 2)[0] for name, pool in ladder.POOLS.items()}
    backward = {name: cleared(back, in_grad, g, in_grad, argidx, 2, 2) for name, back in ladder.POOLS_BACK.items()}
    backward[ladder.TWO] = lambda: ladder.every_number_once(g, in_grad, argidx, 2, 2)    # nothing to clear
    if torch:
        pool, tx, tg = torch.nn.functional.max_pool2d, torch.from_numpy(x), torch.from_numpy(g)
        t64 = tx.double().requires_grad_()
        y64 = pool(t64, 2)
        forward['torch'] = lambda: pool(tx, 2, return_indices=True)[0].numpy()
        backward['torch'] = lambda: torch.autograd.grad(y64, t64, tg, retain_graph=True)[0].numpy()
    return rows_of_rungs('pooling, %d planes of %d x %d' % (channels, side, side), climb(forward, y, turns),
                         climb(backward, in_grad, turns))


# --------------------------------------------------------------------------------------------- the whole network

def through(steps, x):
    for step in steps:
        x = step(x)
    return x


def forward(model, x):
    return through([layer.forward for layer in model.graph_layers.values()], x)


def backward(model, out_grad):
    return through([layer.backward for layer in reversed(list(model.graph_layers.values()))], out_grad)


def twin(model, dtype):
    """The network in torch: a list of functions, with parameters that ask for no gradients."""
    own = {name: [torch.from_numpy(array).to(dtype) for array in (layer.weight, layer.bias)]
           for name, layer in model.graph_layers.items() if isinstance(layer, (ConvolutionLayer, FullyConnectLayer))}
    return list(torch_main.network(own).values())


def loss_gradient(logits):
    loss = CrossEntropy()
    loss.forward(logits, np.array([1]))    # main.py's label
    return loss.backward()


def passes(model, x, turns):
    """Rows for the summary: the layers alone, forward and backward, without the means and sums that main.py prints."""
    out_grad = loss_gradient(forward(model, x))
    works = {'forward': lambda: forward(model, x), 'backward': lambda: backward(model, out_grad)}
    works.update([(name + ' 1', one_thread(work)) for name, work in works.items()])
    if torch:
        float32, x32 = twin(model, torch.float32), torch.from_numpy(x)
        x64, g64 = x32.double().requires_grad_(), torch.from_numpy(out_grad).double()
        y64 = through(twin(model, torch.float64), x64)
        works['torch forward'] = lambda: through(float32, x32)
        works['torch backward'] = lambda: torch.autograd.grad(y64, x64, g64, retain_graph=True)
    say('whole passes')
    times = in_turns(works, turns)
    rows = [ratio('whole forward / torch float32', times['forward'], times['torch forward']),
            ratio('whole backward / torch float64', times['backward'], times['torch backward'])] if torch else []
    return rows + [ratio('one thread / %d threads, both passes' % numba.get_num_threads(),
                         times['forward 1'] + times['backward 1'], times['forward'] + times['backward'])]


def gradient_errors(model, pictures):
    """Rows for the summary: how far each picture's gradient is from one in float64, relative to that.

    From that of these layers; and from torch's, which is another one where maxima tie: torch adds the terms of equal
    windows in different orders in float64, and the last bit decides.
    """
    def ours(x):
        return backward(model, loss_gradient(forward(model, x)))

    def theirs(steps, x):
        x = torch.from_numpy(x).requires_grad_()
        y = through(steps, x)
        g = torch.from_numpy(loss_gradient(y.detach().numpy())).to(y.dtype)
        return torch.autograd.grad(y, x, g)[0].numpy()

    say('gradients')
    right = {'layer.py float64': [ours(x.astype(np.float64)) for x in pictures]}
    found = {'layer.py': [ours(x) for x in pictures]}
    convs = [layer for layer in model.graph_layers.values() if isinstance(layer, ConvolutionLayer)]
    for layer in convs:
        layer._conv = ladder.winograd
    found['Winograd forward'] = [ours(x) for x in pictures]
    for layer in convs:
        del layer._conv
    if torch:
        float32, float64 = twin(model, torch.float32), twin(model, torch.float64)
        right['torch float64'] = [theirs(float64, x.astype(np.float64)) for x in pictures]
        found['torch float32'] = [theirs(float32, x) for x in pictures]
    return [row("picture's gradient, %s / %s" % (name, other), [
        np.linalg.norm(g - r) / np.linalg.norm(r) for g, r in zip(gradients, exact)], '%.1e', '',
        'norm of the difference / norm; pictures: %d' % len(pictures))
        for other, exact in right.items() for name, gradients in found.items()]


# ------------------------------------------------------------------------------------------ main.py as a process

def process(script, **environment):
    """(seconds from start to exit, most bytes resident) of a script; SystemExit with its last line if it fails."""
    with tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        child = subprocess.Popen([sys.executable, script], stdout=subprocess.DEVNULL, stderr=errors,
                                 env=dict(os.environ, **environment))
        _, child.returncode, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        if child.returncode:
            errors.seek(0)
            sys.exit('%s failed: %s' % (script, (errors.read().decode().splitlines() or ['silently'])[-1]))
    return seconds, usage.ru_maxrss * 1024    # KiB on Linux


def processes(turns, ours, theirs):
    """Rows for the summary: main.py with nothing compiled, main.py again, and the script in torch."""
    runs = {'first': [], 'second': [], 'torch': []}
    say('main.py')
    process(ours)    # makes the checkpoint, if it is not there
    for _ in range(turns):
        with tempfile.TemporaryDirectory() as cache:
            for name in 'first', 'second':
                runs[name].append(process(ours, NUMBA_CACHE_DIR=cache))
        runs['torch'] += [process(theirs)] if torch else []
    (first, second, other), sizes = ([np.array([run[k] for run in some]) for some in runs.values()] for k in (0, 1))
    rows = [row('main.py, first run', first, '%.1f', ' s', 'nothing compiled, the checkpoint there'),
            row('main.py, second run', second, '%.2f', ' s', 'from start to exit'),
            row('main.py, most memory', 1e-9 * np.append(*sizes[:2]), '%.2f', ' GB', 'resident')]
    return rows + ([ratio('main.py, second run / torch script', second, other)] if torch else [])


# --------------------------------------------------------------------------------------------------- the report

def measure(turns, pictures):
    """The section of this Python."""
    few = max(1, turns // 3)
    runs = processes(few, os.path.join(PROJECT, 'main.py'), os.path.join(HERE, 'torch_main.py'))
    summary, layers = convolutions(list(convolutions_of(VGG16())), turns)
    rungs, times = convolution_ladder(few)
    tables = rungs, pooling_ladder(turns), layers, windows(turns)
    model = network.loaded()
    summary += passes(model, pictures[0], turns) + runs
    summary += [ratio('layer.py / Winograd, %s' % rungs[0][0], times[ladder.LAYER], times['Winograd'])]
    summary += gradient_errors(model, pictures)
    return '## Python %s\n\n%s; %s; numpy %s, numba %s, %s; %d threads; %d turns, %d of what takes seconds.\n\n%s' % (
        platform.python_version(), time.strftime('%Y-%m-%d'), processor(), np.__version__, numba.__version__,
        'torch ' + torch.__version__ if torch else 'no torch', numba.get_num_threads(), turns, few,
        '\n'.join(table(*rows) for rows in ([['', 'median [least .. largest]', '']] + summary,) + tables))


def processor():
    """Its name, as the system and as the compiler have it."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open('/proc/cpuinfo') as file:
        name = (re.findall(r'(?m)^model name\s*: (.*)', file.read()) or [name])[0]
    return '%s (%s), %d cores' % (name, llvmlite.binding.get_host_cpu_name(), os.cpu_count())


def sections(report):
    """{version: section} of a report, the newest Python last."""
    found = re.findall(r'(?ms)^## Python (\d+)\.(\d+)(.*?)(?=^## |\Z)', report)
    return {(int(a), int(b)): '## Python %s.%s%s\n' % (a, b, text.rstrip()) for a, b, text in found}


def merged(report, new):
    """The report, with the new section in the place of the one of the same Python."""
    both = {**sections(report), **sections(new)}
    return TITLE + '\n'.join(both[version] for version in sorted(both))


def readme(report):
    """README's tables: the summaries' medians, a column for each Python, and the ladder of the newest one."""
    tables = {'Python %d.%d' % version: [
        [[re.sub(r' \[.*', '', cell.strip()) for cell in line[1:-1].split('|')] for line in lines.splitlines()]
        for lines in re.findall(r'(?m)(?:^\|.*\n)+', section)] for version, section in sections(report).items()}
    columns = [{cells[0]: cells[1] for cells in found[0][2:]} for found in tables.values()]
    summary = [[name] + [column.get(name, '') for column in columns] for name in max(columns, key=len)]
    rungs = list(tables.values())[-1][1]
    return '%s\n%s\n%s%s\n' % (BEGIN, table([''] + list(tables), *summary), table(rungs[0], *rungs[2:]), END)


def run(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('pictures', nargs='*', default=[main.IMAGE], help='whose gradients are compared with float64')
    parser.add_argument('--turns', type=int, default=12, help='of what is measured (default 12)')
    parser.add_argument('--report', action='store_true', help='write tests/measured.md')
    parser.add_argument('--readme', action='store_true', help="print README's tables out of tests/measured.md")
    arguments = parser.parse_args(argv)
    if arguments.turns < 1:
        parser.error('--turns: at least 1')
    report = ''
    if os.path.exists(MEASURED):
        with open(MEASURED, encoding='utf-8') as file:
            report = file.read()
        if not report.startswith(TITLE):
            sys.exit('%s: was not written by this script: move it away first' % MEASURED)
    if arguments.readme:
        print(readme(report) if report else sys.exit('%s: is not there: run with --report first' % MEASURED), end='')
        return
    try:
        pictures = [main.process_image(path) for path in arguments.pictures]
    except main.InputError as error:
        sys.exit(str(error))
    new = measure(arguments.turns, pictures)
    print(new, end='')
    if arguments.report:
        with open(MEASURED, 'w', encoding='utf-8') as file:
            file.write(merged(report, new))


if __name__ == '__main__':
    run()
