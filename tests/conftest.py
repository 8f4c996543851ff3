"""What tests share: the project on the import path, marks that choose tests, a loaded network, one run of main.py."""
import concurrent.futures
import os
import subprocess
import sys
import tempfile

import pytest

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, PROJECT)

# In what a student was given, an index past an array is to be an error, not a crash.  The formulas stayed behind.
if not os.path.exists(os.path.join(PROJECT, 'tests', 'textbook.py')):
    os.environ.setdefault('NUMBA_BOUNDSCHECK', '1')

MARKS = {'stage60': 'the network is built and its parameters load',
         'stage80': 'the forward pass is right',
         'stage100': 'the backward pass is right',
         'slow': 'takes more than some seconds: compiles anew, runs many processes, hashes the checkpoint',
         'early(work)': 'work, given an empty folder, is done by other processes: it begins with the first test'}
POOL = concurrent.futures.ThreadPoolExecutor(1)    # beside the tests, which leave the second core idle


def pytest_configure(config):
    for mark in MARKS.items():
        config.addinivalue_line('markers', '%s: %s' % mark)


def in_a_folder(work):
    with tempfile.TemporaryDirectory() as folder:
        return work(folder)


def pytest_collection_finish(session):
    for item in session.items if not session.config.option.collectonly else []:
        mark = item.get_closest_marker('early')
        if mark:
            item.early = POOL.submit(in_a_folder, mark.kwargs['work'])


def pytest_sessionfinish(session):
    for item in getattr(session, 'items', []):
        if hasattr(item, 'early'):
            item.early.cancel()


@pytest.fixture
def early(request):
    """What came of a test's early work."""
    return request.node.early.result()


def run(script='main.py', arguments=(), **changes):
    """Run a script of the project in a changed environment; return (status, standard output, standard error)."""
    environment = dict(os.environ, **changes)
    done = subprocess.run([sys.executable, os.path.join(PROJECT, script)] + list(arguments), stdin=subprocess.DEVNULL,
                          env={key: value for key, value in environment.items() if value is not None},
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return done.returncode, done.stdout.decode('utf-8'), done.stderr.decode('utf-8')


@pytest.fixture(scope='session')
def demo_run():
    """(status, standard output, standard error) of `python main.py`."""
    return run(NUMBA_BOUNDSCHECK=None)


@pytest.fixture(scope='session')
def model():
    """VGG16 with the shipped parameters."""
    import network
    return network.loaded()
