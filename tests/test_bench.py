"""The rungs of tests/ladder.py against the textbook, and the measuring around them against ladders made up here."""
import collections
import functools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

import bench
import bench_network
import ladder
import textbook
from file import picture
from layer import ConvolutionLayer, FlattenLayer, FullyConnectLayer, MaxPoolLayer, ReluLayer

COMMAND = [sys.executable, os.path.join(os.path.dirname(os.path.abspath(__file__)), 'bench.py')]
PEAKS = bench.Machine(1e9, 1e9, 1e9)
EVERYWHERE = os.sched_getaffinity(0) if hasattr(os, 'sched_getaffinity') else set()    # of cores, before any test
RUNGS = {'loop order': ladder.loop_order, 'four channels': ladder.four_channels,
         'tiles': lambda *arrays: ladder.tiles(*(arrays + (False,))),
         'four taps': lambda *arrays: ladder.tiles(*(arrays + (True,)))}


@pytest.mark.parametrize('dtype', [np.float32, np.float64])
@pytest.mark.parametrize('rung', sorted(RUNGS))
@pytest.mark.parametrize('ins, outs, height, width, K', [
    (1, 1, 1, 1, 1), (3, 4, 5, 7, 3), (2, 5, 14, 14, 3), (5, 9, 3, 40, 2), (2, 3, 60, 33, 5), (1, 6, 2, 1000, 3)])
def test_rungs_are_the_textbook(rung, ins, outs, height, width, K, dtype):
    rng = np.random.RandomState(0)
    x = rng.normal(0, 1, (ins, height + K - 1, width + K - 1)).astype(dtype)
    weight, bias = rng.normal(0, 1, (outs, ins, K, K)).astype(dtype), rng.normal(0, 1, outs).astype(dtype)
    y = np.full((outs, height, width), np.nan, dtype)
    right = textbook.conv(x[None], np.empty_like(y[None]), weight, bias, K, 1)[0]
    assert RUNGS[rung](x, y, weight, bias) is y
    assert np.abs(y - right).max() <= np.abs(right).max() * (1e-5 if dtype == np.float32 else 1e-13)


def test_planes_too_wide_for_a_tile_are_refused():
    x, weight = np.zeros((1, 3, ladder.PITCH + 3), np.float32), np.zeros((1, 1, 3, 3), np.float32)
    y = np.zeros((1, 1, ladder.PITCH + 1), np.float32)
    for rung in ('four channels', 'tiles'):
        with pytest.raises(AssertionError):
            RUNGS[rung](x, y, weight, np.zeros(1, np.float32))


def small_ladders():
    return (bench.convolution_ladders('conv', ConvolutionLayer(5, 6, 3, padding=1), (5, 9, 7), PEAKS, 4)
            + bench.pooling_ladders('pool', MaxPoolLayer(), (3, 8, 6), PEAKS))


def test_small_ladders_are_right():
    """Every rung, layer.py and torch included, forward and backward."""
    ladders = small_ladders()
    assert [steps.title for steps in ladders] == ['conv forward, float32', 'conv backward, float64',
                                                  'pool forward, float32', 'pool backward, float64']
    assert [steps.work for steps in ladders] == [2 * 6 * 5 * 9 * 9 * 7] * 2 + [
        4 * 3 * (48 + 12 + 12), 3 * (8 * 48 + 8 * 12 + 4 * 12)]
    for steps in ladders:
        assert ('torch' in steps.rungs) == (bench.torch is not None)
        bench.check(steps)


@pytest.mark.parametrize('idle', [False, True])
@pytest.mark.parametrize('which', range(4))
def test_a_wrong_rung_is_named(which, idle):
    """One that is off by a little in its last number; and one that leaves what the rung before it had computed."""
    steps = small_ladders()[which]
    name, run = list(steps.rungs.items())[2]

    def wrong():
        result = [steps.buffers[0]] if idle else run()
        if not idle:
            result[0][-1, -1, -1] += 0.001 * np.abs(result[0]).max()
        return result

    steps.rungs[name] = wrong
    with pytest.raises(SystemExit, match='%s: "%s" differs' % (steps.title, name)):
        bench.check(steps)


def made_up(**rungs):
    """A ladder whose textbook does a quarter of the work."""
    rungs = collections.OrderedDict([(bench.TEXTBOOK, rungs.pop('textbook'))] + sorted(rungs.items()))
    return bench.Ladder('layer1 forward', 'some planes', rungs, [0], 0.25, (), 4e9, 'GFLOP/s', 8e9)


def test_the_textbook_is_scaled_up_to_all_channels():
    medians = bench.measure(made_up(textbook=lambda: time.sleep(0.02), other=lambda: time.sleep(0.02)), 3)
    assert medians[bench.TEXTBOOK] >= 0.08 and medians['other'] < medians[bench.TEXTBOOK]


def test_work_takes_turns():
    seen = []
    times = bench.in_turns({'a': lambda: seen.append('a'), 'b': lambda: seen.append('b')}, 3)
    assert seen == ['a', 'b'] * 3 and [len(times[name]) for name in 'ab'] == [3, 3]


def test_what_warms_up_is_not_timed():
    naps = iter([0.2, 0, 0.2, 0])
    times = bench.in_turns({'a': lambda: time.sleep(next(naps))}, 2, warm=True)
    assert len(times['a']) == 2 and max(times['a']) < 0.1


def test_on_one_thread_leaves_the_number_of_threads_as_it_was():
    before = bench.get_num_threads()
    assert bench.on_one_thread(bench.get_num_threads)() == 1
    with pytest.raises(ZeroDivisionError):
        bench.on_one_thread(lambda: 1 / 0)()
    assert bench.get_num_threads() == before
    others = [7]
    assert bench.on_one_thread(lambda: others[-1], lambda: others[-1], others.append)() == 1
    assert others == [7, 1, 7] and bench.get_num_threads() == before


def test_table():
    lines = bench.table(made_up(textbook=None), collections.OrderedDict([
        (bench.TEXTBOOK, 20.0), ('layer.py', 0.8)])).splitlines()
    assert lines[0] == 'layer1 forward: some planes'
    assert lines[2].split() == ['textbook', 'order', '20.00000', '0.2', '2.5', '%', '1.0']
    assert lines[3].split() == ['layer.py', '0.80000', '5.0', '62.5', '%', '25.0']


def test_plot_has_a_bar_for_every_rung():
    steps = made_up(textbook=None)
    page = bench.drawn([(steps, {bench.TEXTBOOK: 100.0, 'layer.py': 1.0}), (steps, {bench.TEXTBOOK: 2.0})], 'note')
    red = (page == picture.RED).all(axis=2)
    bars = [row for row in red if row.sum() > 130]
    assert len(bars) == 18 and all(row[336:336 + 135].all() for row in bars), 'half of the peak, half of the bar'
    frame = np.ones(page.shape[:2], bool)
    frame[30:-30, 110:-110] = False
    assert (page[frame] == picture.PAPER).all(), 'something runs into the margin'


@pytest.mark.parametrize('arguments, reason', [
    (['--layer', 'layer9_conv1'], 'layer9_conv1'), (['--plot', 'out.gif'], 'out.gif'),
    (['--repeats', '0'], '--repeats')])
def test_wrong_arguments_are_refused_before_anything_is_measured(arguments, reason):
    done = subprocess.run(COMMAND + arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    assert (done.returncode, done.stdout) == (2, '') and reason in done.stderr.splitlines()[-1]


def test_command(tmp_path):
    done = subprocess.run(COMMAND + ['--layer', 'layer5_maxpool', '--repeats', '1', '--plot', 'out.png'],
                          cwd=str(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    assert done.returncode == 0, done.stderr
    for title in ('layer5_maxpool forward, float32', 'layer5_maxpool backward, float64'):
        assert title + ': 512 planes of 14 x 14' in done.stdout
    assert os.listdir(str(tmp_path)) == ['out.png']


# -------------------------------------------------------------------------------------------- --network

class Small(object):
    """A network of a few layers with VGG16's names."""

    def __init__(self):
        self.graph_layers = {'layer1_conv1': ConvolutionLayer(3, 4, 3, padding=1), 'layer1_relu1': ReluLayer(),
                             'layer1_maxpool': MaxPoolLayer(), 'flatten': FlattenLayer(),
                             'fullyconnect1': FullyConnectLayer(64, 4)}
        for name in ('layer1_conv1', 'fullyconnect1'):
            layer = self.graph_layers[name]
            layer.load_params(layer.weight.astype(np.float32), layer.bias.astype(np.float32))

    def forward(self, x):
        for name, layer in self.graph_layers.items():
            print(name)
            x = layer.forward(x)
        return x

    def backward(self, grad):
        for layer in reversed(list(self.graph_layers.values())):
            grad = layer.backward(grad)
        return grad


def test_layer_table_has_a_row_for_every_layer_and_their_sum(monkeypatch):
    """Medians and extremes are those of the rounds, for all layers those of whole rounds; so is the ratio."""
    rounds = {}

    def in_turns(works, repeats, warm):
        assert (repeats, warm) == (10, True)
        for work in works.values():
            work()
        turn = len(rounds)    # another round is the slow one for each layer
        rounds[turn] = [turn + 1 + np.roll(some, turn) for some in ((1., 3, 50), (4., 2, 8))]
        return {name: 1e-3 * rounds[turn]['torch' in name] for name in works}

    monkeypatch.setattr(bench_network, 'in_turns', in_turns)
    tables = bench_network.layer_table(Small(), np.ones((1, 3, 8, 8), np.float32), 2).split('\n\n')
    assert len(tables) == 2
    for way, lines in zip(('forward', 'backward'), tables):
        head, *rows = [re.sub(r'[][]|\.\.', ' ', line).split() for line in lines.split('\n')]
        assert head == ['milliseconds', way] + ['torch', 'ratio'] * bool(bench.torch)
        assert [row[0] for row in rows] == list(Small().graph_layers) + ['all']
        layers = [rounds[turn] for turn in reversed(range(len(rounds)))]    # they are timed from the last one on
        for row, (mine, other) in zip(rows, layers + [np.sum(layers, axis=0)]):
            right = [(np.median(some), min(some), max(some)) for some in (mine, other)[:1 + bool(bench.torch)]]
            right = np.append(right, [np.median(mine / other)] * bool(bench.torch))
            np.testing.assert_allclose(np.array(row[1:], float), right, atol=0.005)


def test_window_table_divides_seconds_by_multiply_adds(monkeypatch):
    def a_microsecond_each(works, repeats, warm):
        assert warm
        for work in works.values():
            work()
        return {key: [1e-6] for key in works}

    monkeypatch.setattr(bench_network, 'in_turns', a_microsecond_each)
    rows = [line.rsplit(None, 4) for line in bench_network.window_table(1, channels=2, side=9).splitlines()[1:]]
    assert [row[0] for row in rows] == ['K = %d, S = %d' % window for window in bench_network.WINDOWS]
    for (K, S), row in zip(bench_network.WINDOWS, rows):
        operations = 2 * 2 * K * K * len(range(0, 9, S))**2
        for nanoseconds, ratio in (row[1:3], row[3:]):
            assert float(nanoseconds) == pytest.approx(1e6 / operations, abs=0.006)
            assert float(ratio) == pytest.approx(2 * 2 * 9 * 81 / operations, abs=0.006)


def test_passes_print_nothing_of_the_network(capsys, monkeypatch):
    monkeypatch.setattr(bench_network, 'torch', None)
    seconds = iter([1.0, 3.0])
    monkeypatch.setattr(bench_network, 'textbook_passes', lambda *arguments: (None, None, next(seconds)))
    model, x = Small(), np.ones((1, 3, 8, 8), np.float32)
    model.forward(x)
    capsys.readouterr()
    text = bench_network.passes(model, x, 2)
    assert 'textbook / ours' in text and '2.000 s [1.000 .. 3.000]' in text and capsys.readouterr().out == ''


@pytest.mark.skipif(bench.get_num_threads() == 1, reason='one thread only')
def test_passes_without_prints_are_all_layers_on_as_many_threads(capsys, monkeypatch):
    monkeypatch.setattr(bench_network, 'ROUNDS', 1)
    monkeypatch.setattr(bench_network, 'torch', None)
    monkeypatch.setattr(bench_network, 'textbook_passes', lambda *arguments: (None, None, 70.0))
    model, x, threads, many = Small(), np.ones((1, 3, 8, 8), np.float32), [], bench.get_num_threads()
    logits = model.forward(x)
    in_grad = model.backward(np.ones((1, 4)))
    for way in ('forward', 'backward'):
        monkeypatch.setattr(MaxPoolLayer, way, lambda self, x, plain=getattr(MaxPoolLayer, way): (
            threads.append(bench.get_num_threads()) or plain(self, x)))

    def in_turns(works, repeats, warm):
        capsys.readouterr()
        model.forward = model.backward = None    # what prints
        for name in ('', ' 1'):
            np.testing.assert_array_equal(works['bare forward' + name](), logits)
            np.testing.assert_array_equal(works['bare backward' + name](), in_grad)
        return {name: [1.0 + ('bare' in name) + 4 * ('1' in name)] for name in works}

    monkeypatch.setattr(bench_network, 'in_turns', in_turns)
    rows = [line.split(None, 1) for line in bench_network.passes(model, x, 1).splitlines()]
    assert [row[0] for row in rows] == ['17.50', '35.00', '5.00', '3.00']
    assert ['without prints' in row[1] for row in rows] == [True, False, False, True]
    assert threads == [many, many, 1, 1] and capsys.readouterr().out == ''


@pytest.mark.skipif(bench.get_num_threads() == 1, reason='one thread only')
def test_passes_compare_one_thread_with_many_of_the_same_side(monkeypatch):
    torch = pytest.importorskip('torch')
    monkeypatch.setattr(bench_network, 'ROUNDS', 1)
    seconds = {'forward': 3, 'backward': 4, 'forward 1': 5, 'backward 1': 9, 'torch forward': 10, 'torch backward': 20,
               'torch forward 1': 11, 'torch backward 1': 64, 'bare forward': 1, 'bare backward': 3,
               'bare forward 1': 6, 'bare backward 1': 5}
    threads, before = [], torch.get_num_threads()

    def in_turns(works, repeats, warm):
        assert set(works) == set(seconds)
        monkeypatch.setattr(torch.autograd, 'grad', lambda *some, **more: threads.append(torch.get_num_threads()))
        for name in ('torch backward', 'torch backward 1'):
            works[name]()
        return {name: [1.0 * seconds[name]] for name in works}

    monkeypatch.setattr(bench_network, 'in_turns', in_turns)
    monkeypatch.setattr(bench_network, 'twin', lambda model, dtype: {})
    monkeypatch.setattr(bench_network, 'textbook_passes', lambda *arguments: (None, None, 70.0))
    lines = bench_network.passes(Small(), np.ones((1, 3, 8, 8), np.float32), 1).splitlines()
    ratios = [line.split()[0] for line in lines]
    assert ratios == ['0.30', '0.20', '17.50', '10.00', '2.00', '2.75', '2.50'] and lines[-1].split('/')[1].startswith(
        " %d threads, torch's passes" % bench.get_num_threads())
    assert threads == [before, 1] and torch.get_num_threads() == before


@pytest.mark.skipif(bench.get_num_threads() == 1 or not EVERYWHERE,
                    reason='one thread only, or one that cannot be sent to a core')
def test_passes_send_one_thread_to_each_core_in_turn(monkeypatch):
    """Also with a neighbour, and also when it fails; several threads may go everywhere."""
    monkeypatch.setattr(bench_network, 'torch', None)
    monkeypatch.setattr(bench_network, 'textbook_passes', lambda *arguments: (None, None, 70.0))
    busy, seen = threading.Event(), {}

    def in_turns(works, repeats, warm):
        assert (repeats, warm) == (1, True)
        for name, work in works.items():
            work()
            seen.setdefault(name, []).append(notes.pop())
        turn, names = len(seen['forward']), list(works)
        assert names == sorted(names, key=bench_network.ORDER.index)
        slow = 1.0 + turn // 4 % 2    # the machine, in four rounds and not in the next four
        return {name: [slow * (1 + turn % 2 * 2 * name.endswith('1'))] for name in names}    # 1 on every other core

    notes, model, x = [], Small(), np.ones((1, 3, 8, 8), np.float32)
    model.forward(x)
    for layer in (MaxPoolLayer, FullyConnectLayer):
        for way in ('forward', 'backward'):
            monkeypatch.setattr(layer, way, lambda self, y, plain=getattr(layer, way): (
                notes.append(os.sched_getaffinity(0)) or plain(self, y)))
    monkeypatch.setattr(bench_network, 'in_turns', in_turns)
    lines = bench_network.passes(model, x, 1, busy=busy).splitlines()
    cores = sorted(EVERYWHERE)
    for name, places in seen.items():
        turns = [{cores[turn % len(cores)]} for turn in range(bench_network.ROUNDS)]
        assert places == (turns if '1' in name else [EVERYWHERE] * bench_network.ROUNDS)
    if len(cores) == 2:
        assert lines[2].split()[0] == '1.50'    # a core that takes 3 seconds and one that takes 1: 4 passes in 6
    with pytest.raises(ZeroDivisionError):
        bench_network.on_first(cores, lambda: 1 / 0)()
    assert os.sched_getaffinity(0) == EVERYWHERE
    assert bench_network.on_first([], lambda: os.sched_getaffinity(0))() == EVERYWHERE


@pytest.mark.parametrize('times, cores, seconds', [([1, 3, 2, 2], 2, [1.5, 2]), ([1, 3, 9], 2, [1.5]), ([4], 2, [4]),
                                                   ([1, 2], 0, [1, 2])])
def test_the_average_is_that_of_speeds(times, cores, seconds):
    np.testing.assert_allclose(bench_network.of_average_speed(np.array(times, float), cores), seconds)


def noting_network(path):
    """A network, as another process takes it, that notes each layer's work in a file: how many threads it has."""
    def noted(work):
        def run(y):
            with open(path, 'a') as file:
                file.write('%d' % bench.get_num_threads())
            time.sleep(0.01)
            return work(y)
        return run

    model = Small()
    for layer in model.graph_layers.values():
        layer.forward, layer.backward = noted(layer.forward), noted(layer.backward)
    return model, np.ones((1, 3, 8, 8), np.float32)


def test_the_neighbour_works_on_one_thread_while_it_is_told_to(tmp_path):
    path, layers = tmp_path / 'notes', len(Small().graph_layers)
    with bench_network.neighbour(functools.partial(noting_network, str(path))) as busy:
        time.sleep(0.2)
        assert path.read_text() == '1' * 2 * layers    # one pass, before it is ready, and no more
        assert bench_network.while_busy(lambda: time.sleep(0.5) or 'done', busy)() == 'done' and not busy.is_set()
        time.sleep(0.2)
        noted = path.read_text()
        assert len(noted) > 3 * layers and set(noted) == {'1'}
        with pytest.raises(ZeroDivisionError):
            bench_network.while_busy(lambda: 1 / 0, busy)()
        assert not busy.is_set()
        time.sleep(0.2)
        noted = path.read_text()
        time.sleep(0.2)
        assert path.read_text() == noted
        busy.set()
    noted = path.read_text()
    time.sleep(0.2)
    assert path.read_text() == noted    # it is gone


@pytest.mark.parametrize('busy', ['set', 'clear'])
def test_the_neighbour_ends_with_a_bench_that_is_killed(tmp_path, busy):
    words = textwrap.dedent("""
        import functools, os, sys, time
        sys.path.insert(0, %r)
        import bench_network, test_bench
        with bench_network.neighbour(functools.partial(test_bench.noting_network, %r)) as busy:
            busy.%s()
            other, = bench_network.multiprocessing.active_children()
            print(other.pid, flush=True)
            time.sleep(60)
        """) % (os.path.dirname(os.path.abspath(__file__)), str(tmp_path / 'notes'), busy)
    killed = subprocess.Popen([sys.executable, '-c', words], stdout=subprocess.PIPE)
    other = int(killed.stdout.readline())
    killed.kill()
    try:
        killed.communicate(timeout=30)    # until nobody has its end of the pipe any more
    except subprocess.TimeoutExpired:
        os.kill(other, signal.SIGKILL)
        pytest.fail('it is still there')


def test_without_a_neighbour_the_rows_go_on(capfd):
    with bench_network.neighbour(int) as busy:    # no network: it fails
        assert busy is None
    assert 'without a second process: it ended with status 1' in capfd.readouterr().err


def test_a_neighbour_that_ends_too_early_is_told_of(tmp_path, capfd):
    with bench_network.neighbour(functools.partial(noting_network, str(tmp_path / 'notes'))):
        other, = multiprocessing.active_children()
        assert 'ended' not in capfd.readouterr().err
        other.terminate()
        other.join()
    assert 'the second process ended too early, with status -15' in capfd.readouterr().err


@pytest.mark.skipif(bench.get_num_threads() == 1, reason='one thread only')
def test_two_processes_stand_beside_one_that_does_the_work_of_both(monkeypatch):
    monkeypatch.setattr(bench_network, 'ROUNDS', 1)
    monkeypatch.setattr(bench_network, 'torch', None)
    monkeypatch.setattr(bench_network, 'textbook_passes', lambda *arguments: (None, None, 70.0))
    busy, seen = threading.Event(), []
    monkeypatch.setattr(MaxPoolLayer, 'forward', lambda self, x, plain=MaxPoolLayer.forward: (
        seen.append((bench.get_num_threads(), busy.is_set())) or plain(self, x)))
    model, x = Small(), np.ones((1, 3, 8, 8), np.float32)
    model.forward(x)
    seen.clear()

    def in_turns(works, repeats, warm):
        works['bare forward 1']()
        works['bare forward 1 beside']()
        return {name: [6.0 if 'beside' in name else 5.0 if name.endswith('1') else 1.0] for name in works}

    monkeypatch.setattr(bench_network, 'in_turns', in_turns)
    ratio, words = bench_network.passes(model, x, 1, busy=busy).splitlines()[-1].split(None, 1)
    assert (ratio, seen) == ('1.67', [(1, False), (1, True)])    # 20 s of work in 12
    assert words.startswith('one process twice / two at once') and '20.000 s' in words and '12.000 s' in words


def test_textbook_passes_are_the_networks(monkeypatch):
    """And their seconds are those in the formulas: here each of the six takes one, and nothing else any."""
    model, rng, clock = Small(), np.random.RandomState(0), []
    x, out_grad = rng.normal(0, 1, (2, 3, 8, 8)).astype(np.float32), rng.normal(0, 1, (2, 4))
    logits = model.forward(x)
    in_grad = model.backward(out_grad)
    monkeypatch.setattr(time, 'perf_counter', lambda: clock.append(0) or len(clock))
    plain_logits, plain_grad, seconds = bench_network.textbook_passes(model, x, out_grad)
    np.testing.assert_allclose(plain_logits, logits, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(plain_grad, in_grad, rtol=1e-12, atol=1e-18)
    assert (seconds, len(clock)) == (6, 12)


def test_a_row_is_the_median_of_the_rounds_ratios():
    words = bench_network.row('a / b', [1, 3, 50], [4, 2, 8]).split()
    assert words == '1.50 a / b 3.000 s [1.000 .. 50.000] / 4.000 s [2.000 .. 8.000]'.split()


def test_process_measures_seconds_and_memory_and_names_a_failure():
    seconds, size = bench_network.process([sys.executable, '-c', 'import time; b"x" * 900000000; time.sleep(0.2)'])
    assert seconds >= 0.2 and 9e8 <= size < 1.1e9
    with pytest.raises(RuntimeError, match='failed: broken'):
        bench_network.process([sys.executable, '-c', 'import sys; sys.exit("broken")'])


def test_the_network_in_torch_is_the_same_network():
    torch = pytest.importorskip('torch')
    model, x = bench_network.random_network()
    x64 = torch.from_numpy(x).double().requires_grad_()
    y32, y64, out, g = torch.from_numpy(x), x64, x, np.ones((1, 4), np.float32)
    for name, layer in model.graph_layers.items():
        out = layer.forward(out)
    float32, float64 = bench_network.twin(model, torch.float32), bench_network.twin(model, torch.float64)
    assert list(float32) == list(model.graph_layers)
    for name in float32:
        y32, y64 = float32[name](y32), float64[name](y64)
    assert np.abs(out - y32.numpy()).max() < 1e-4 * np.abs(out).max()
    for layer in reversed(list(model.graph_layers.values())):
        g = layer.backward(g)
    right = torch.autograd.grad(y64, x64, torch.ones((1, 4)).double())[0].numpy()
    # a ReLU or a maximum that float32 decides otherwise moves single pixels: the whole is compared
    assert np.linalg.norm(g - right) < 0.01 * np.linalg.norm(right)
