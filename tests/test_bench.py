"""The rungs of tests/ladder.py against the textbook; the bench's arithmetic; README's numbers against measured.md."""
import os
import subprocess
import sys

import numba
import numpy as np
import pytest

import bench
import ladder
import textbook
from layer import ConvolutionLayer, FullyConnectLayer
from vgg import VGG16

HERE = os.path.dirname(os.path.abspath(__file__))


# ------------------------------------------------------------------------------------------------- the rungs

@pytest.mark.slow
@pytest.mark.parametrize('rung, dtype', [(rung, np.float32) for rung in list(ladder.RUNGS)[1:]] + [
    (rung, np.float64) for rung in list(ladder.RUNGS)[1:] if rung != 'Winograd'])
@pytest.mark.parametrize('batch, ins, outs, height, width, K', [
    (1, 1, 1, 1, 1, 3), (2, 3, 5, 5, 7, 3), (1, 4, 9, 14, 14, 3), (1, 2, 3, 66, 35, 3), (1, 1, 2, 3, 500, 3),
    (1, 2, 3, 5, 6, 5), (2, 5, 4, 3, 4, 1)])
def test_rungs_are_the_textbook_both_ways(rung, batch, ins, outs, height, width, K, dtype):
    """To the bit, but for Winograd's, which is for float32; planes of 66 x 35 and 3 x 500 take more than one tile."""
    rng = np.random.RandomState(0)
    x = rng.normal(0, 1, (batch, ins, height + K - 1, width + K - 1)).astype(dtype)
    weight, bias = bench.parameters(rng, outs, ins, K)
    g = rng.normal(0, 1, (batch, outs, height, width)).astype(dtype)
    right = (textbook.conv(x, np.empty_like(g), weight, bias, K, 1),
             textbook.conv_back(g, np.zeros_like(x), weight, K, 1))
    if rung == 'Winograd' and K != 3:
        with pytest.raises(ValueError, match='a window of 3'):
            ladder.winograd(x, np.empty_like(g), weight, bias, K, 1)
        return
    framed, turned, nothing = ladder.turned(g, weight)
    found = (ladder.RUNGS[rung](x, np.full_like(g, np.nan), weight, bias, K, 1),
             ladder.RUNGS[rung](framed, np.full_like(x, np.nan), turned, nothing, K, 1))
    for some, wanted in zip(found, right):
        limit = np.abs(wanted).max() * 1e-5 if rung == 'Winograd' else 0
        assert some.dtype == dtype and np.abs(some - wanted).max() <= limit


@pytest.mark.parametrize('rung', ['four channels', 'tiles', 'three taps'])
def test_planes_too_wide_for_a_tile_are_refused(rung):
    x, weight = np.zeros((1, 1, 3, ladder.BAND + 3), np.float32), np.zeros((1, 1, 3, 3), np.float32)
    with pytest.raises(AssertionError):
        ladder.RUNGS[rung](x, np.zeros((1, 1, 1, ladder.BAND + 1), np.float32), weight, np.zeros(1, np.float32), 3, 1)


def test_equal_windows_tell_winograd_from_the_formula():
    """Every third window of a pattern that repeats itself; in a tile of 2 x 2 they lie in different places."""
    rng = np.random.RandomState(0)
    weight, bias = bench.parameters(rng, 4, 16, 3)
    x = np.tile(rng.normal(0, 1, (1, 16, 3, 3)).astype(np.float32), (1, 1, 3, 3))[:, :, :8, :8].copy()
    for rung, equal in (('textbook', True), (ladder.LAYER, True), ('Winograd', False)):
        y = ladder.RUNGS[rung](x, np.empty((1, 4, 6, 6), np.float32), weight, bias, 3, 1)
        assert (y[:, :, 3:, 3:] == y[:, :, :3, :3]).all() == equal
        y = ladder.RUNGS[rung](np.ones_like(x), y, weight, bias, 3, 1)
        assert (y == y[:, :, :1, :1]).all()


def test_pooling_rungs_are_the_textbook():
    x = np.random.RandomState(0).randint(0, 3, (2, 3, 8, 10)).astype(np.float32)    # many are equal
    wanted = textbook.pool(np.empty((2, 3, 4, 5), np.float32), x, np.empty((2, 3, 4, 5), np.int32), 2, 2)
    g = np.random.RandomState(1).normal(0, 1, wanted[0].shape)
    for name in ladder.POOLS:
        y, argidx = ladder.POOLS[name](np.empty_like(wanted[0]), x, np.full_like(wanted[1], -1), 2, 2)
        np.testing.assert_array_equal(y, wanted[0])
        np.testing.assert_array_equal(argidx, wanted[1])
        np.testing.assert_array_equal(ladder.POOLS_BACK[name](g, np.zeros(x.shape), argidx, 2, 2),
                                      textbook.pool_back(g, np.zeros(x.shape), argidx, 2, 2))


def test_rungs_run_as_plain_python():
    words = '''
import numpy as np, ladder
x, y = np.arange(32, dtype='f4').reshape(1, 2, 4, 4), np.zeros((1, 1, 2, 2), 'f4')
for rung in ladder.RUNGS.values():
    print(rung(x, y * np.nan, np.ones((1, 2, 3, 3), 'f4'), np.ones(1, 'f4'), 3, 1).ravel().tolist())
for pool in ladder.POOLS.values():
    print(pool(np.zeros((1, 2, 2, 2), 'f4'), x, np.zeros((1, 2, 2, 2), 'i4'), 2, 2)[0].ravel().tolist())
for back in ladder.POOLS_BACK.values():
    print(back(y + 1., np.zeros((1, 1, 4, 4)), np.ones((1, 1, 2, 2), 'i4'), 2, 2).ravel().tolist())
'''
    printed = subprocess.run([sys.executable, '-c', words], stdout=subprocess.PIPE, universal_newlines=True, env=dict(
        os.environ, NUMBA_DISABLE_JIT='1', PYTHONPATH=os.pathsep.join([HERE, os.path.dirname(HERE)]))).stdout
    lines = printed.splitlines()
    assert lines[:7] == ['[235.0, 253.0, 307.0, 325.0]'] * 7
    assert len(lines) == 13 and len(set(lines[7:10])) == len(set(lines[10:])) == 1


# --------------------------------------------------------------------------------------------------- measuring

def numbers(cells):
    """The medians in a row of cells."""
    return [float(some.split()[0]) for some in cells]


def fake_turns(monkeypatch, seconds):
    """Let each work be done once and have taken seconds(its name)."""
    def in_turns(works, turns):
        for work in works.values():
            work()
        return {name: np.array(seconds(name), float) for name in works}
    monkeypatch.setattr(bench, 'in_turns', in_turns)


def test_turns_are_taken_and_short_work_is_warm():
    seen, clock = [], iter(range(100))
    work = {'a': lambda: seen.append('a'), 'long': lambda: (seen.append('long'), next(clock))}
    real, bench.time.perf_counter = bench.time.perf_counter, lambda: next(clock) * (0.3 if seen[-1] == 'a' else 1.)
    try:
        times = bench.in_turns(work, 2)
    finally:
        bench.time.perf_counter = real
    assert seen == ['a', 'a', 'long', 'long', 'a', 'a', 'long'] and {len(some) for some in times.values()} == {2}


def test_one_thread_leaves_the_number_of_threads_as_it_was():
    before = numba.get_num_threads()
    assert bench.one_thread(numba.get_num_threads)() == 1
    with pytest.raises(ZeroDivisionError):
        bench.one_thread(lambda: 1 / 0)()
    assert numba.get_num_threads() == before


def test_a_ratio_is_one_of_each_turn():
    assert bench.ratio('a / b', np.array([1, 3, 50.]), np.array([4, 2, 8.])) == [
        'a / b', '1.50 [0.25 .. 6.25]', '3.000 s / 4.000 s']


def test_shares_are_of_the_largest_peak_and_means_of_large_layers(monkeypatch):
    layers = [('one', ConvolutionLayer(2, 3, 3, padding=1), (2, 28, 28)), ('two', ConvolutionLayer(2, 6, 3, padding=1),
              (2, 28, 28)), ('small', ConvolutionLayer(2, 3, 3, padding=1), (2, 5, 5))]
    threads = []
    monkeypatch.setattr(ladder, 'compute', lambda *some: threads.append(numba.get_num_threads()))
    fake_turns(monkeypatch, lambda name: [2, 1, 4] if isinstance(name, type) else [1, 1, 2])
    summary, (heads, *rows) = bench.convolutions(layers, 3, rounds=1)
    assert threads == [1] * 6 and len(heads) == 4
    share = [100 * 54 * outs * side**2 / (64 * ladder.QUARTER) / 3 * 3 for outs, side in ((1, 28), (2, 28), (1, 5))]
    for cells, wanted in zip(rows, share):
        assert cells[1:] == ['%.0f [%.0f .. %.0f]' % (wanted, wanted / 2, wanted)] * 3
    assert [numbers(cells[1:2]) for cells in summary[2:]] == [[round(sum(share[:2]) / 2)]] * 3


def test_windows_are_measured_by_their_multiply_adds(monkeypatch):
    fake_turns(monkeypatch, lambda name: [1e-6])
    rows = bench.windows(1, channels=2, side=9)[1:]
    for (K, S), cells in zip(bench.WINDOWS, rows):
        macs = 4 * K * K * len(range(0, 9, S))**2
        assert cells[0] == 'K = %d, S = %d' % (K, S)
        np.testing.assert_allclose(numbers(cells[1:]), [1e6 / macs, 4 * 9 * 81 / macs] * 2, atol=0.006)


def test_ladders_have_a_row_for_each_rung():
    rows, forward = bench.convolution_ladder(1, channels=5, side=6)
    assert [cells[0] for cells in rows[1:]] == list(forward) == list(ladder.RUNGS) + ['torch'] * bool(bench.torch)
    assert {len(cells) for cells in rows} == {5} and [rows[1][2], rows[1][4]] == ['1', '1']
    rows = bench.pooling_ladder(1, channels=2, side=6)
    assert [cells[0] for cells in rows[1:]] == list(ladder.POOLS) + ['torch'] * bool(bench.torch)


@pytest.mark.parametrize('name, error, wrong', [
    ('tiles', 0, False), ('tiles', 1e-7, True), ('Winograd', 1e-7, False), ('Winograd', 1e-3, True),
    ('tiles', np.nan, True), ('Winograd', None, True)])
def test_a_wrong_rung_is_named(name, error, wrong):
    """One that is off by a little in its last number, and one that leaves what the rung before it had computed."""
    out = np.zeros(3, np.float32)

    def work(error):
        out[:] = out if error is None else [1, -4, 4 * (1 + error)]
        return out

    rungs = {'textbook': lambda: work(0), name: lambda: work(error)}
    if wrong:
        with pytest.raises(SystemExit, match='%s differs' % name):
            bench.climb(rungs, out, 1, ['Winograd'])
    else:
        assert list(bench.climb(rungs, out, 1, ['Winograd'])) == list(rungs)


# --------------------------------------------------------------------------------------------- the whole network

@pytest.fixture
def narrow():
    """VGG16 with eight channels a layer, and its input."""
    model, rng = VGG16(), np.random.RandomState(0)
    for name, layer in model.graph_layers.items():
        if isinstance(layer, ConvolutionLayer):
            model.graph_layers[name] = layer = ConvolutionLayer(min(8, layer.in_channels), 8, 3, padding=1)
            layer.load_params(*bench.parameters(rng, 8, layer.in_channels, 3))
        if isinstance(layer, FullyConnectLayer):
            model.graph_layers[name] = layer = FullyConnectLayer(8, 4 if name == 'fullyconnect3' else 8)
            layer.load_params(rng.normal(0, 1, layer.weight.shape).astype('f4'), rng.normal(0, 1, len(layer.bias)))
    return model, rng.normal(0, 1, (1, 3, 32, 32)).astype(np.float32)


def test_passes_go_through_all_layers(narrow, monkeypatch, capsys):
    seconds = {'forward': 2, 'backward': 4, 'forward 1': 5, 'backward 1': 7, 'torch forward': 8, 'torch backward': 16}
    fake_turns(monkeypatch, lambda name: [seconds[name]])
    rows = bench.passes(*narrow, turns=1)
    assert [numbers(cells[1:2]) for cells in rows] == [[0.25], [0.25]] * bool(bench.torch) + [[2]]
    assert rows[-1][0].startswith('one thread / %d threads' % numba.get_num_threads()) and capsys.readouterr().out == ''


def test_errors_of_gradients(narrow, monkeypatch):
    """Small in float32, larger where what stands for Winograd is off; and the layers are as they were."""
    model, x = narrow
    monkeypatch.setattr(ladder, 'winograd', lambda *arrays: 1.5 * ladder.RUNGS['Winograd'](*arrays))
    rows = bench.gradient_errors(model, [x, -x])
    found = {cells[0].split(', ')[1]: numbers(cells[1:2])[0] for cells in rows}
    assert len(rows) == len(found) == (6 if bench.torch else 2)
    for name, error in found.items():
        assert error > 1e-2 if name.startswith('Winograd') else 0 < error < 1e-5
    assert bench.gradient_errors(model, [x, -x]) == rows


def test_the_network_in_torch_is_the_same_network(narrow):
    torch = pytest.importorskip('torch')
    model, x = narrow
    x = x.astype(np.float64)
    y, right = bench.forward(model, x), torch.from_numpy(x).requires_grad_()
    logits = bench.through(bench.twin(model, torch.float64), right)
    np.testing.assert_allclose(logits.detach().numpy(), y, rtol=1e-9)
    g = bench.loss_gradient(y)
    wanted = torch.autograd.grad(logits, right, torch.from_numpy(g))[0].numpy()
    assert np.abs(wanted).max() > 0
    np.testing.assert_allclose(bench.backward(model, g), wanted, rtol=1e-9, atol=1e-12 * np.abs(wanted).max())


def test_convolutions_of_a_network_know_their_inputs():
    shapes = [shape for _, _, shape in bench.convolutions_of(VGG16())]
    assert len(shapes) == 13 and shapes[::4] == [(3, 224, 224), (128, 56, 56), (512, 28, 28), (512, 14, 14)]


def test_process_measures_seconds_and_memory_and_names_a_failure(tmp_path):
    script = tmp_path / 'script.py'
    script.write_text('import time; b"x" * 900000000; time.sleep(0.2)')
    seconds, size = bench.process(str(script))
    assert seconds >= 0.2 and 9e8 <= size < 1.1e9
    script.write_text('import os, sys; sys.exit(os.environ["WHY"])')
    with pytest.raises(SystemExit, match='script.py failed: broken'):
        bench.process(str(script), WHY='broken')


def test_a_first_run_has_a_fresh_cache_and_a_second_one_the_same(monkeypatch):
    caches = []

    def process(script, NUMBA_CACHE_DIR=None):
        fresh = NUMBA_CACHE_DIR not in caches
        caches.append(NUMBA_CACHE_DIR)
        assert NUMBA_CACHE_DIR is None or os.path.isdir(NUMBA_CACHE_DIR)
        return (8., 7e8) if script == 'torch' else (9. if fresh else 4., 8e8 if fresh else 6e8)

    monkeypatch.setattr(bench, 'process', process)
    rows = bench.processes(2, 'ours', 'torch')
    assert len(set(caches)) == 3
    assert [cells[1] for cells in rows] == ['9.0 s [9.0 .. 9.0]', '4.00 s [4.00 .. 4.00]', '0.70 GB [0.60 .. 0.80]'] + [
        '0.50 [0.50 .. 0.50]'] * bool(bench.torch)


# --------------------------------------------------------------------------------------------------- the report

def made_up(version, name='whole forward / torch float32'):
    return '## Python %s\n\nwords\n\n%s\n%s' % (
        version, bench.table(['', 'median', ''], ['peak', '5 GFLOP/s [4 .. 6]', ''], [name, '1.50 [1.0 .. 2.0]', 'of']),
        bench.table(['256', 'ms', 'times'], ['textbook', '9.0 [8.0 .. 9.5]', version], ['tiles', '1.0 [1 .. 2]', '9']))


def test_a_report_keeps_what_other_pythons_measured():
    report = bench.merged('', made_up('3.11.7'))
    report = bench.merged(bench.merged(report, made_up('3.7.16', 'old')), made_up('3.7.17', 'new'))
    assert report.startswith(bench.TITLE + '## Python 3.7.17') and 'old' not in report
    assert report == bench.TITLE + made_up('3.7.17', 'new') + '\n' + made_up('3.11.7')
    assert bench.readme(report).splitlines() == [
        bench.BEGIN, '|  | Python 3.7 | Python 3.11 |', '| --- | ---: | ---: |', '| peak | 5 GFLOP/s | 5 GFLOP/s |',
        '| new | 1.50 |  |', '', '| 256 | ms | times |', '| --- | ---: | ---: |', '| textbook | 9.0 | 3.11.7 |',
        '| tiles | 1.0 | 9 |', bench.END]


def test_command(tmp_path, monkeypatch, capsys):
    path = tmp_path / 'measured.md'
    monkeypatch.setattr(bench, 'MEASURED', str(path))
    monkeypatch.setattr(bench, 'measure', lambda turns, pictures: made_up('3.%d.0' % turns))
    for arguments, words in (
            (['--readme'], 'run with --report first'), (['--turns', '0'], '2'), (['none.jpg'], 'none.jpg')):
        with pytest.raises(SystemExit, match=words):
            bench.run(arguments)
    bench.run(['--turns', '9'])
    assert not path.exists()
    bench.run(['--turns', '9', '--report'])
    bench.run(['--turns', '8', '--report'])
    assert path.read_text() == bench.TITLE + made_up('3.8.0') + '\n' + made_up('3.9.0')
    capsys.readouterr()
    bench.run(['--readme'])
    assert capsys.readouterr().out == bench.readme(path.read_text())
    path.write_text('my notes')
    with pytest.raises(SystemExit, match='was not written by this script'):
        bench.run(['--report'])
    assert path.read_text() == 'my notes'


def test_readme_quotes_what_was_measured():
    with open(bench.MEASURED, encoding='utf-8') as file:
        wanted = bench.readme(file.read())
    with open(os.path.join(bench.PROJECT, 'README.md'), encoding='utf-8') as file:
        text = file.read()
    assert text[text.index(bench.BEGIN):text.index(bench.END) + len(bench.END) + 1] == wanted
