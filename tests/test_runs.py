"""main.py as a process: the expected lines, the same bytes on any number of threads, hostile surroundings."""
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import compare
import main
import network
import tensors
from conftest import PROJECT, run
from file.making import expand

SCRIPT = os.path.join(PROJECT, 'main.py')
EXPECTED = os.path.join(PROJECT, 'file', 'expected_output.txt')


def lines_of(demo_run, status=0, err=''):
    """The lines of a run without the last, which is its seconds."""
    assert (demo_run[0], demo_run[2]) == (status, err)
    lines = demo_run[1].splitlines()
    assert float(lines[-1]) > 0
    return lines[:-1]


def expected_tensors():
    with open(os.path.join(PROJECT, 'file', 'expected_tensors.txt')) as file:
        return file.read().splitlines()


@pytest.fixture(scope='module')
def steps(model):
    """Every tensor of the demo's run, [(direction, name, tensor)]."""
    return list(network.walk(model, main.process_image(main.IMAGE), 1))


# ------------------------------------------------------------------------------------------- the transcript

def test_transcript_agrees_with_the_expected_one(demo_run):
    """Compared as a student does it, but closer: what is left is the order in which a version of numpy adds."""
    lines_of(demo_run)
    magnitudes = compare.magnitudes_of(EXPECTED, None)
    rows = compare.compare(compare.parse(EXPECTED), compare.lines_of(demo_run[1]), magnitudes)
    assert len(rows) == 78
    for row in rows:
        assert row['verdict'] == 'same' or row['verdict'] == 'ok' and row['error'] <= row['tolerance'] / 10, row


def test_transcript_is_the_handbooks_line_by_line(demo_run, steps):
    """Every number in it is numpy's mean or sum of the tensor itself, unformatted."""
    lines = lines_of(demo_run)
    numbers = ['{} {}'.format(tensor.mean(), tensor.sum()) for _, _, tensor in steps]
    names = ['%s: %s: ' % step[:2] for step in steps]
    logits = steps[37][2]
    loss = main.CrossEntropy().forward(logits, np.array([1]))
    assert lines[:16] == ['reloaded success'] * 16
    assert lines[16:53] == [name + text for name, text in zip(names[:37], numbers)]
    assert lines[53:56] == [str(logits), main.CLASSES[logits.argmax()], str(loss)]
    assert lines[56:93] == [name + text for name, text in zip(names[38:-1], numbers[38:-1])]
    assert lines[93:] == [numbers[-1]]


def test_the_demo_picture_is_recognised(demo_run):
    logits = np.array(lines_of(demo_run)[53].strip('[]').split(), dtype=float)
    assert lines_of(demo_run)[54] == 'tulips'
    assert np.exp(logits[3]) / np.exp(logits).sum() >= 0.9


@pytest.mark.parametrize('threads', ['1', '3'])
def test_any_number_of_threads_prints_the_same_bytes(demo_run, threads):
    assert lines_of(run(NUMBA_NUM_THREADS=threads)) == lines_of(demo_run)


def test_tensors_are_the_expected_ones_to_the_bit(steps):
    assert [tensors.line(*step) for step in steps] == expected_tensors()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, 'uname') or os.uname().machine != 'x86_64', reason='names x86 processors')
@pytest.mark.early(work=lambda folder: run('tests/tensors.py', NUMBA_CPU_NAME='haswell', NUMBA_CACHE_DIR=folder,
                                           NUMBA_CPU_FEATURES='+avx,+avx2,+fma'))
def test_an_older_processor_computes_the_same_bits(early):
    status, out, err = early
    assert status == 0, err
    assert out.splitlines() == expected_tensors()


# ---------------------------------------------------------------------------------------------- surroundings

def copy_of_the_project(folder):
    shutil.copytree(PROJECT, folder, ignore=shutil.ignore_patterns('.*', '__pycache__', 'tests', '*.npy'))
    return folder


def test_loops_run_where_no_cache_can_be_written(tmp_path):
    """Files stand where numba would make its folders: beside the loops, in the user's cache and in his home."""
    copy = copy_of_the_project(str(tmp_path / 'copy'))
    blocked = tmp_path / 'a file, not a folder'
    blocked.write_text('')
    shutil.copy(str(blocked), os.path.join(copy, '__pycache__'))
    nowhere = {name: str(blocked) for name in ('HOME', 'XDG_CACHE_HOME', 'LOCALAPPDATA')}
    code = 'import numpy, layer; print(layer.MaxPoolLayer().forward(numpy.arange(4.).reshape(1, 1, 2, 2)).item())'
    environment = dict(os.environ, PYTHONPATH=copy, **nowhere)
    environment.pop('NUMBA_CACHE_DIR', None)
    done = subprocess.run([sys.executable, '-c', code], env=environment, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, universal_newlines=True, cwd=str(tmp_path))
    assert (done.returncode, done.stdout) == (0, '3.0\n')
    assert os.path.isfile(os.path.join(copy, '__pycache__')), 'numba has found a place after all'


@pytest.mark.slow
@pytest.mark.skipif(os.name == 'nt', reason='limits the size of files')
def test_a_full_disk_is_said(tmp_path):
    """No file may get a single byte: neither the checkpoint nor the compiled loops can be kept."""
    import resource
    copy = copy_of_the_project(str(tmp_path / 'copy'))
    done = subprocess.run([sys.executable, os.path.join(copy, 'main.py')], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, env=dict(os.environ, NUMBA_CACHE_DIR=str(tmp_path / 'cache')),
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)))
    err = done.stderr.decode()
    assert done.returncode == 1 and 'cannot be written' in err and 'Traceback' not in err
    assert 'NUMBA_CACHE_DIR' in err.splitlines()[-1]
    assert not [name for name in os.listdir(os.path.join(copy, 'file')) if 'ckpt.npy' in name]


def test_it_runs_from_any_folder_and_in_ascii(demo_run, tmp_path, monkeypatch):
    monkeypatch.chdir(str(tmp_path))
    assert lines_of(run(PYTHONIOENCODING='ascii', LC_ALL='C')) == lines_of(demo_run)


def test_an_error_about_a_chinese_path_is_printed_in_ascii(tmp_path):
    status, out, err = run(SCRIPT, [str(tmp_path / '\u6ca1\u6709.jpg')], PYTHONIOENCODING='ascii', LC_ALL='C.UTF-8')
    assert (status, out) == (1, '')
    assert 'cannot be read' in err and 'Traceback' not in err


def test_a_closed_pipe_ends_it_quietly():
    process = subprocess.Popen([sys.executable, '-u', SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline().split() == [b'reloaded', b'success']
    process.stdout.close()
    assert process.stderr.read() == b''
    assert process.wait() == 0


@pytest.mark.skipif(os.name == 'nt', reason='sends a signal')
def test_ctrl_c_ends_it_in_a_line():
    process = subprocess.Popen([sys.executable, '-u', SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1].decode().splitlines() == ['main.py: interrupted']
    assert process.returncode == 130


def expanding(tmp_path):
    """Start to expand the shipped network into a file."""
    return subprocess.Popen([sys.executable, expand.__file__, '--out', str(tmp_path / 'c.npy')], stdout=subprocess.PIPE)


@pytest.mark.slow
def test_two_runs_that_expand_at_once_make_one_file(tmp_path):
    both = [expanding(tmp_path), expanding(tmp_path)]
    hashes = [process.communicate()[0] for process in both]
    assert hashes[0] == hashes[1] and len(hashes[0].split()[0]) == 64
    assert os.listdir(str(tmp_path)) == ['c.npy']


@pytest.mark.slow
@pytest.mark.skipif(os.name == 'nt', reason='sends a signal')
def test_a_run_that_is_killed_while_it_expands_leaves_no_half_checkpoint(tmp_path):
    process = expanding(tmp_path)
    while not any(part.endswith('.part') for part in os.listdir(str(tmp_path))):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (tmp_path / 'c.npy').exists()
    assert len(expanding(tmp_path).communicate()[0].split()[0]) == 64
    assert (tmp_path / 'c.npy').exists()


# ------------------------------------------------------------------------------------------------ the loops

def with_every_index_checked(folder):
    """The comparisons with the formulas once more, compiled anew, into another cache."""
    done = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-k', 'formula and (float64 or fully)',
                           os.path.join(PROJECT, 'tests', 'test_layers.py')], stdout=subprocess.PIPE,
                          env=dict(os.environ, NUMBA_BOUNDSCHECK='1', NUMBA_CACHE_DIR=folder))
    return done.returncode, done.stdout.decode()


@pytest.mark.slow
@pytest.mark.early(work=with_every_index_checked)
def test_no_loop_leaves_its_arrays(early):
    assert early[0] == 0 and ' passed' in early[1], early[1][-4000:]


@pytest.mark.parametrize('layer, code', [
    ('omp', '''
import threading
results, twins = [None] * 4, [threading.Thread(target=lambda place: results.__setitem__(place, numbers(place)),
                                               args=(place,)) for place in range(4)]
for thread in twins: thread.start()
for thread in twins: thread.join()
assert results == [numbers(place) for place in range(4)]
'''), ('workqueue', '''
import multiprocessing
expected = [numbers(place) for place in range(4)]
with multiprocessing.get_context('fork').Pool(2) as pool:
    assert pool.map_async(numbers, range(4)).get(60) == expected
'''), pytest.param(None, '''
import multiprocessing
if __name__ == '__main__':
    expected = [numbers(place) for place in range(4)]
    with multiprocessing.get_context('spawn').Pool(2) as pool:
        assert pool.map_async(numbers, range(4)).get(60) == expected
''', marks=pytest.mark.slow)], ids=['threads', 'forked pool after a pass', 'spawned pool after a pass'])
def test_networks_side_by_side(tmp_path, layer, code):
    """In threads of OpenMP, numba's default on Linux; in forked processes with its workqueue; in others always."""
    path = tmp_path / 'side_by_side.py'
    path.write_text('''
import sys
sys.path.insert(0, %r)
import numpy as np
from layer import ConvolutionLayer, FullyConnectLayer

def numbers(seed):
    random, layer, total = np.random.RandomState(seed), ConvolutionLayer(2, 5, 3, padding=1), []
    layer.load_params(random.randn(5, 2, 3, 3), random.randn(5))
    for _ in range(20):
        outputs = layer.forward(random.randn(2, 2, 30, 30))
        total.append(float(layer.backward(outputs).sum()))
    return total
''' % PROJECT + code)
    done = subprocess.run([sys.executable, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=120,
                          env=dict(os.environ, **({'NUMBA_THREADING_LAYER': layer} if layer else {})))
    if b'No threading layer could be loaded' in done.stderr:
        pytest.skip('numba has no %s here' % layer)
    assert (done.returncode, done.stderr) == (0, b'')
