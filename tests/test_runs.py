"""main.py as a process: the same bytes with any number of threads, and no harm from hostile surroundings."""
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import main
from file import expand

PROJECT = os.path.dirname(os.path.abspath(main.__file__))
FILE = os.path.join(PROJECT, 'file')


def run(script='main.py', arguments=(), without=(), **changes):
    """Run a script of the project in a changed environment; return (status, standard output, standard error)."""
    environment = {key: value for key, value in os.environ.items() if key not in without}
    environment.update(changes)
    done = subprocess.run([sys.executable, os.path.join(PROJECT, script)] + list(arguments), env=environment,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
    return done.returncode, done.stdout.decode('utf-8'), done.stderr.decode('utf-8')


def transcript(text):
    """The lines of a run without the last, which is its seconds."""
    lines = text.splitlines()
    assert float(lines[-1]) > 0
    return lines[:-1]


@pytest.fixture(scope='module')
def plain_run():
    status, out, err = run()
    assert status == 0, err
    return transcript(out)


# ------------------------------------------------------------------------------------------- the transcript

def expected_tensors():
    with open(os.path.join(FILE, 'expected_tensors.txt')) as file:
        return file.read().splitlines()


@pytest.mark.stage100
def test_transcript_is_the_expected_one(plain_run):
    """Means and sums agree relative to the sum of magnitudes of the tensor that a line tells of."""
    with open(os.path.join(FILE, 'expected_output.txt')) as file:
        expected = transcript(file.read())
    known = {}
    for line in expected_tensors():
        direction, name, _, shape, magnitude, _ = line.split()
        known[direction + ':', name + ':'] = np.prod([float(size) for size in shape.split('x')]), float(magnitude)
    assert len(plain_run) == len(expected)
    for line, wanted in zip(plain_run, expected):
        words, right = line.split(), wanted.split()
        if words[0] in ('forward:', 'backward:'):
            assert words[:2] == right[:2]
            size, magnitude = known[words[0], words[1]]
            assert abs(float(words[3]) - float(right[3])) <= 1e-6 * magnitude, line
            assert abs(float(words[2]) - float(right[2])) <= 1e-6 * magnitude / size, line
        elif line != wanted:
            numbers = [np.array(text.strip('[]').split(), dtype=float) for text in (line, wanted)]
            np.testing.assert_allclose(*numbers, rtol=1e-6)


@pytest.mark.stage80
def test_transcript_has_the_handbooks_lines(plain_run):
    assert plain_run[:16] == ['reloaded success'] * 16
    assert [line.split()[:2] for line in plain_run[16:53]][::36] == [['forward:', 'layer1_conv1:'],
                                                                     ['forward:', 'fullyconnect3:']]
    logits = np.array(plain_run[53].strip('[]').split(), dtype=float)
    assert plain_run[54] == 'tulips' == main.CLASSES[logits.argmax()]
    probability = np.exp(logits[3]) / np.exp(logits).sum()
    assert probability >= 0.9
    np.testing.assert_allclose(float(plain_run[55]), np.log(np.exp(logits).sum()) - logits[1], rtol=1e-4)
    assert [line.split()[:2] for line in plain_run[56:93]][::36] == [['backward:', 'fullyconnect3:'],
                                                                      ['backward:', 'layer1_conv1:']]
    mean, total = map(float, plain_run[93].split())
    np.testing.assert_allclose(mean * 3 * 224 * 224, total, rtol=1e-6)
    assert len(plain_run) == 94


@pytest.mark.parametrize('threads', ['1', '3', '8'])
def test_any_number_of_threads_prints_the_same_bytes(plain_run, threads):
    status, out, err = run(NUMBA_NUM_THREADS=threads)
    assert (status, err) == (0, '')
    assert transcript(out) == plain_run


def test_tensors_are_the_expected_ones_to_the_bit():
    status, out, err = run('tests/tensors.py')
    assert status == 0, err
    assert out.splitlines() == expected_tensors()


@pytest.mark.skipif(not hasattr(os, 'uname') or os.uname().machine != 'x86_64', reason='names x86 processors')
def test_an_older_processor_computes_the_same_bits(tmp_path):
    status, out, err = run('tests/tensors.py', NUMBA_CPU_NAME='haswell', NUMBA_CPU_FEATURES='+avx,+avx2,+fma',
                           NUMBA_CACHE_DIR=str(tmp_path))
    assert status == 0, err
    assert out.splitlines() == expected_tensors()


# ---------------------------------------------------------------------------------------------- surroundings

def test_it_runs_where_no_cache_can_be_written(plain_run, tmp_path):
    """Files stand where numba would make its folders: beside the loops, in the user's cache and in his home."""
    copy = str(tmp_path / 'copy')
    shutil.copytree(PROJECT, copy, ignore=shutil.ignore_patterns('.*', '__pycache__', 'tests', 'vgg16_ckpt.npy'))
    blocked = tmp_path / 'a file, not a folder'
    blocked.write_text(u'')
    shutil.copy(str(blocked), os.path.join(copy, '__pycache__'))
    nowhere = {name: str(blocked) for name in ('HOME', 'XDG_CACHE_HOME', 'LOCALAPPDATA')}
    environment = dict(os.environ, **nowhere)
    environment.pop('NUMBA_CACHE_DIR', None)
    arguments = ['--ckpt', os.path.join(FILE, 'vgg16_ckpt.npy')]
    asked = subprocess.run([sys.executable, '-c', 'import layer; print(type(layer._relu._cache).__name__)'],
                           cwd=copy, env=environment, stdout=subprocess.PIPE)
    assert asked.stdout.split() == [b'NullCache'], 'numba has found a place after all'
    status, out, err = run(os.path.join(copy, 'main.py'), arguments, without=['NUMBA_CACHE_DIR'], **nowhere)
    assert (status, err) == (0, '')
    assert transcript(out) == plain_run


@pytest.mark.skipif(os.name == 'nt', reason='limits the size of files')
def test_it_runs_on_a_full_disk(plain_run, tmp_path):
    """No file may get a single byte: neither the checkpoint nor the compiled loops can be kept."""
    import resource
    copy = str(tmp_path / 'copy')
    shutil.copytree(PROJECT, copy, ignore=shutil.ignore_patterns('.*', '__pycache__', 'tests', 'vgg16_ckpt.npy'))
    done = subprocess.run([sys.executable, os.path.join(copy, 'main.py')], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, env=dict(os.environ, NUMBA_CACHE_DIR=str(tmp_path / 'cache')),
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)))
    assert done.returncode == 0, done.stderr.decode()
    assert 'cannot be written' in done.stderr.decode() and 'Traceback' not in done.stderr.decode()
    assert transcript(done.stdout.decode()) == plain_run
    assert not [name for name in os.listdir(os.path.join(copy, 'file')) if 'ckpt.npy' in name]


def test_it_runs_from_any_folder_and_in_ascii(plain_run, tmp_path, monkeypatch):
    monkeypatch.chdir(str(tmp_path))
    status, out, err = run(PYTHONIOENCODING='ascii', LC_ALL='C')
    assert (status, err) == (0, '')
    assert transcript(out) == plain_run


def test_an_error_about_a_chinese_path_is_printed_in_ascii(tmp_path):
    status, out, err = run(arguments=[str(tmp_path / u'\u6ca1\u6709.jpg')], PYTHONIOENCODING='ascii', LC_ALL='C.UTF-8')
    assert (status, out) == (1, '')
    assert 'cannot be read' in err and 'Traceback' not in err


def test_a_closed_pipe_ends_it_quietly():
    process = subprocess.Popen([sys.executable, '-u', os.path.join(PROJECT, 'main.py')], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    assert process.stdout.readline().split() == [b'reloaded', b'success']
    process.stdout.close()
    assert process.stderr.read() == b''
    assert process.wait() == 0


def wait_for_imports(process):
    """Until the process has begun to load OpenCV, the first that main.py imports; numba and the rest take longer."""
    maps = '/proc/%d/maps' % process.pid
    if not os.path.exists(maps):
        time.sleep(0.25)    # no Linux
        return
    while process.poll() is None:
        with open(maps) as file:
            if 'cv2' in file.read():
                return


@pytest.mark.skipif(os.name == 'nt', reason='sends a signal')
@pytest.mark.parametrize('moment', ['importing', 'running'])
def test_ctrl_c_ends_it_in_a_line(moment):
    process = subprocess.Popen([sys.executable, '-u', os.path.join(PROJECT, 'main.py')], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    if moment == 'running':
        process.stdout.readline()
    else:
        wait_for_imports(process)
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1].decode().splitlines() == ['main.py: interrupted']
    assert process.returncode == 130


def expanding(tmp_path, name):
    """Start to expand the shipped network into a file."""
    return subprocess.Popen([sys.executable, expand.__file__, '--out', str(tmp_path / name)], stdout=subprocess.PIPE)


def test_two_runs_that_expand_at_once_make_one_file(tmp_path):
    both = [expanding(tmp_path, 'c.npy'), expanding(tmp_path, 'c.npy')]
    hashes = [process.communicate()[0] for process in both]
    assert hashes[0] == hashes[1] and len(hashes[0].split()[0]) == 64
    assert os.listdir(str(tmp_path)) == ['c.npy']


@pytest.mark.skipif(os.name == 'nt', reason='sends a signal')
def test_a_run_that_is_killed_while_it_expands_leaves_no_half_checkpoint(tmp_path):
    process = expanding(tmp_path, 'c.npy')
    while not any(part.endswith('.part') for part in os.listdir(str(tmp_path))):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (tmp_path / 'c.npy').exists()
    assert expanding(tmp_path, 'c.npy').communicate()[0].split()[0]
    assert (tmp_path / 'c.npy').exists()


# ------------------------------------------------------------------------------------------------ the loops

def test_no_loop_leaves_its_arrays(tmp_path):
    """The comparisons with the formulas once more, with every index checked (compiled anew, into another cache)."""
    environment = dict(os.environ, NUMBA_BOUNDSCHECK='1', NUMBA_CACHE_DIR=str(tmp_path))
    done = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-k', 'formula or boundary',
                           os.path.join(PROJECT, 'tests', 'test_layers.py')], env=environment, stdout=subprocess.PIPE)
    assert done.returncode == 0, done.stdout.decode()[-4000:]
    assert b' passed' in done.stdout
