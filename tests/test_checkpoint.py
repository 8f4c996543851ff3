"""Checkpoints: exact to the bit, readable by plain numpy, and never more than data."""
import hashlib
import io
import os
import pickle
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from file import checkpoint, expand
from vgg import VGG16

SHAPES = {'first': (3, 2, 2, 2), 'second': (4, 5)}


def small(dtype=np.float32):
    rng = np.random.RandomState(3)
    return {name: {'weight': rng.randn(*shape).astype(dtype), 'bias': rng.randn(shape[0]).astype(dtype)}
            for name, shape in SHAPES.items()}


def saved(path, content):
    with open(str(path), 'wb') as file:
        file.write(content)
    return str(path)


def as_npy(payload):
    """An .npy file around a pickle."""
    file = io.BytesIO()
    np.save(file, np.array({}, dtype=object))
    return file.getvalue()[:file.getvalue().index(b'\x80')] + payload


def npy(content, protocol=3):
    return as_npy(pickle.dumps(np.array(content, dtype=object), protocol=protocol))


def assert_equal(ckpt, expected):
    assert list(ckpt) == list(expected)
    for name in expected:
        for key in ('weight', 'bias'):
            np.testing.assert_array_equal(ckpt[name][key], expected[name][key])


def network_shapes():
    return {name: layer.weight_shape for name, layer in VGG16().graph_layers.items() if hasattr(layer, 'weight_shape')}


# -------------------------------------------------------------------------------------------------- packing

def test_packing_is_exact_and_close():
    weight = np.random.RandomState(0).standard_t(4, size=(20, 3, 7, 7)) * np.logspace(-6, 3, 20)[:, None, None, None]
    weight[3], weight[4, 0] = 0, 0
    q, scale = expand.pack(weight)
    unpacked = expand.unpack(q, scale)
    assert q.dtype == np.int8 and unpacked.dtype == np.float32 and q.min() >= -127
    exact = np.sign(q) * q.astype(np.float64)**2 * scale.astype(np.float64)[:, None, None, None]
    np.testing.assert_array_equal(unpacked.astype(np.float64), exact)
    np.testing.assert_array_equal(unpacked[3], 0)
    largest = np.abs(weight).max(axis=(1, 2, 3), keepdims=True)
    # squares of neighbouring whole numbers r and r + 1 are 2r + 1 apart
    assert (np.abs(unpacked - weight) <= (np.sqrt(np.abs(weight) * largest) / 127 + largest / 127**2) * 1.01).all()
    again = expand.unpack(*expand.pack(unpacked))
    assert (np.abs(again - unpacked) <= np.abs(unpacked - weight).max(axis=(1, 2, 3), keepdims=True) + 1e-30).all()


@pytest.mark.stage60
def test_shipped_checkpoint_has_one_hash_and_plain_numpy_reads_it():
    checkpoint.load()    # expands it where it is not there
    digest = hashlib.sha256()
    with open(checkpoint.EXPANDED, 'rb') as file:
        for block in iter(lambda: file.read(1 << 24), b''):
            digest.update(block)
    with open(os.path.join(expand.HERE, 'vgg16_ckpt.sha256')) as file:
        assert digest.hexdigest() == file.read().split()[0]
    plain = np.load(checkpoint.EXPANDED, allow_pickle=True).item()
    assert {name: plain[name]['weight'].shape for name in plain} == network_shapes()
    assert sum(array.size for layer in plain.values() for array in layer.values()) == 134276932
    assert all(array.dtype == np.float32 and array.flags.c_contiguous and array.flags.writeable
               for layer in plain.values() for array in layer.values())
    assert all(layer['weight'].any(axis=tuple(range(1, layer['weight'].ndim))).all() for layer in plain.values())
    assert_equal(checkpoint.load(), plain)


def test_shipped_file_is_compact_and_holds_no_pickle():
    assert os.path.getsize(expand.PACKED) <= 40 * 10**6
    with np.load(expand.PACKED, allow_pickle=False) as packed:
        assert all(packed[key].dtype in (np.int8, np.float32) for key in packed.files)


def test_written_files_are_what_numpy_would_read(tmp_path):
    path = str(tmp_path / 'small.npy')
    with open(path, 'wb') as file:
        expand.write(file, ((name, layer['weight'], layer['bias']) for name, layer in small().items()))
    assert_equal(np.load(path, allow_pickle=True).item(), small())
    assert_equal(checkpoint.read(path), small())


# ------------------------------------------------------------------------------------------ reading others'

@pytest.mark.parametrize('protocol', [protocol for protocol in (2, 3, 4, 5) if protocol <= pickle.HIGHEST_PROTOCOL])
@pytest.mark.parametrize('change', [lambda a: a, np.asfortranarray, lambda a: a.astype('>f4'),
                                    lambda a: a.astype(np.float64), lambda a: a[::-1].copy()[::-1]])
def test_every_way_in_which_numpy_pickles_an_array(tmp_path, protocol, change, capsys):
    content = {name: {key: change(array) for key, array in layer.items()} for name, layer in small().items()}
    path = saved(tmp_path / 'c.npy', npy(content, protocol))
    ckpt = checkpoint.load(path, SHAPES)
    assert_equal(ckpt, small())
    for layer in ckpt.values():
        for array in layer.values():
            assert array.dtype == np.float32 and array.dtype.isnative
            assert array.flags.c_contiguous and array.flags.aligned and array.flags.writeable
    if content['second']['weight'].dtype == np.float64:
        assert 'converted' in capsys.readouterr().err


@pytest.mark.parametrize('core', [b'numpy.core', b'numpy._core'])
def test_module_names_of_both_numpys(tmp_path, core):
    payload = pickle.dumps(np.array(small(), dtype=object), protocol=2)
    for name in (b'numpy._core', b'numpy.core'):
        payload = payload.replace(b'c' + name + b'.', b'c' + core + b'.')
    assert b'c' + core + b'.multiarray\n' in payload
    assert_equal(checkpoint.read(saved(tmp_path / 'c.npy', as_npy(payload))), small())


def test_a_large_array_stays_in_its_file(tmp_path):
    content = {'first': {'weight': np.arange(1 << 20, dtype=np.float32), 'bias': np.zeros(1, np.float32)}}
    path = saved(tmp_path / 'c.npy', npy(content))
    before = open(path, 'rb').read()
    ckpt = checkpoint.read(path)
    assert_equal(ckpt, content)
    ckpt['first']['weight'][:] = 0    # a private map: the file does not change
    assert open(path, 'rb').read() == before


# ------------------------------------------------------------------------------------------------- accidents

class Program(object):
    def __reduce__(self):
        return os.system, ('echo this was run',)


def changed(**layers):
    content = small()
    content.update(layers)
    return npy(content)


def layer(weight=np.zeros((4, 5), np.float32), bias=np.zeros(4, np.float32)):
    return {'weight': weight, 'bias': bias}


ACCIDENTS = {
    'program': (npy({'first': Program()}), 'asks to run (posix|nt).system'),
    'program in a bare pickle of protocol 0': (as_npy(b"cos\nsystem\n(S'echo this was run'\ntR."), 'asks to run os.system'),
    'numpy name that is none of ours': (as_npy(b'cnumpy\nsave\n.'), 'asks to run numpy.save'),
    'empty': (b'', 'empty'),
    'cut after the header': (npy(small())[:200], 'cut short or damaged'),
    'cut at the end': (npy(small())[:-3], 'cut short or damaged'),
    'git lfs pointer': (b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n', 'git lfs pull'),
    'web page': (b'\n<!DOCTYPE html><html></html>', 'web page'),
    'archive': (b'PK\x03\x04' + bytes(100), 'archive'),
    'bare pickle': (pickle.dumps(small(), protocol=2), 'bare pickle'),
    'text': (b'hello', 'no .npy file'),
    'plain array': (as_npy(b'')[:6] + b'\x01\x00\x46\x00' + b"{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }".ljust(69)
                    + b'\n' + bytes(8), 'array of float32'),
    'list': (npy([1, 2]), 'a dict of layers expected'),
    'missing layer': (npy({'first': small()['first']}), 'lacks second'),
    'unknown layer': (changed(third=layer()), 'unknown layers third'),
    'no bias': (changed(second={'weight': np.zeros((4, 5))}), "second: {'weight': ..., 'bias': ...} expected"),
    'layer that is a number': (changed(second=3), 'second'),
    'list for an array': (changed(second=layer(weight=[[1.0]])), 'second weight: an array expected, got list'),
    'wrong shape': (changed(second=layer(weight=np.zeros((5, 4), np.float32))),
                    r'second weight: shape \(4, 5\) expected, got \(5, 4\)'),
    'wrong bias': (changed(second=layer(bias=np.zeros(5, np.float32))), r'second bias: shape \(4,\) expected'),
    'nan': (changed(second=layer(bias=np.array([0, 1, np.nan, 2], np.float32))), 'second bias: has numbers that are not'),
    'infinity': (changed(second=layer(bias=np.array([0, np.inf, -np.inf, 2], np.float32))), 'not finite'),
    'whole numbers': (changed(second=layer(weight=np.zeros((4, 5), int))), 'not of floating-point numbers'),
    'text numbers': (changed(second=layer(weight=np.array(['a']))), 'not of floating-point numbers'),
}


@pytest.mark.parametrize('name', sorted(ACCIDENTS))
def test_accidents_get_one_clear_message(tmp_path, name, capfd):
    content, words = ACCIDENTS[name]
    path = saved(tmp_path / 'c.npy', content)
    with pytest.raises(checkpoint.CheckpointError, match=words) as error:
        checkpoint.load(path, SHAPES)
    assert path in str(error.value) and '\n' not in str(error.value)
    assert 'this was run' not in capfd.readouterr().out


def test_absent_file_and_folder(tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match='no such file'):
        checkpoint.load(str(tmp_path / 'absent.npy'))
    with pytest.raises(checkpoint.CheckpointError, match='folder|cannot be read'):
        checkpoint.load(str(tmp_path))


def test_numbers_whose_sum_overflows_are_finite_all_the_same(tmp_path):
    content = small()
    content['second']['bias'] = np.full(4, 3e38, np.float32)
    assert_equal(checkpoint.load(saved(tmp_path / 'c.npy', npy(content)), SHAPES), content)


def test_flipped_bytes_give_a_checkpoint_or_the_clear_error(tmp_path):
    rng = np.random.RandomState(11)
    good = [npy(small(), protocol) for protocol in (2, 3, 4)]
    outcomes = {'loaded': 0, 'refused': 0}
    for trial in range(1500):
        content = bytearray(good[trial % 3])
        for _ in range(rng.randint(1, 4)):
            content[rng.randint(len(content))] = rng.randint(256)
        if trial % 7 == 0:
            del content[rng.randint(len(content)):]
        try:
            checkpoint.load(saved(tmp_path / 'c.npy', bytes(content)), SHAPES)
            outcomes['loaded'] += 1
        except checkpoint.CheckpointError:
            outcomes['refused'] += 1
    assert min(outcomes.values()) > 100


# -------------------------------------------------------------------------------------------------- expanding

@pytest.fixture
def small_package(tmp_path, monkeypatch):
    """A packed file of one small layer in a folder of its own."""
    q, scale = expand.pack(small()['second']['weight'])
    packed, expanded = str(tmp_path / 'p.npz'), str(tmp_path / 'c.npy')
    np.savez_compressed(packed, **{'second.q': q, 'second.scale': scale, 'second.bias': small()['second']['bias']})
    monkeypatch.setattr(checkpoint, 'PACKED', packed)
    monkeypatch.setattr(checkpoint, 'EXPANDED', expanded)
    return tmp_path


def test_load_expands_once_and_says_so(small_package, capsys):
    ckpt = checkpoint.load(None, {'second': (4, 5)})
    assert 'c.npy is not there' in capsys.readouterr().err
    assert sorted(os.listdir(str(small_package))) == ['c.npy', 'p.npz']
    assert_equal(checkpoint.load(None, {'second': (4, 5)}), ckpt)
    assert capsys.readouterr().err == ''


def test_something_else_is_done_while_it_expands(small_package, monkeypatch):
    begun, called, calls = threading.Event(), threading.Event(), []

    def write(*arguments):
        begun.set()
        assert called.wait(60)
        return plain_write(*arguments)

    def meanwhile():
        assert begun.wait(60)
        calls.append('while it is written')
        called.set()

    plain_write = expand.write
    monkeypatch.setattr(expand, 'write', write)
    ckpt = checkpoint.load(None, {'second': (4, 5)}, meanwhile)
    assert_equal(checkpoint.load(None, {'second': (4, 5)}, meanwhile), ckpt)
    assert len(calls) == 1    # not when the file is there
    os.remove(checkpoint.EXPANDED)
    os.remove(checkpoint.PACKED)
    with pytest.raises(checkpoint.CheckpointError, match='p.npz is not there'):
        checkpoint.load(None, None, meanwhile)
    assert len(calls) == 1    # nor before an error that is known at once


def test_ctrl_c_while_it_expands_and_something_else_is_done_leaves_nothing(small_package, monkeypatch):
    begun = threading.Event()

    def layers(path):
        begun.set()
        for _ in range(600):    # a minute
            time.sleep(0.1)
            yield 'second', small()['second']['weight'], small()['second']['bias']

    def cut():
        assert begun.wait(60)
        raise KeyboardInterrupt

    monkeypatch.setattr(expand, 'packed_layers', layers)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.load(None, None, cut)
    assert os.listdir(str(small_package)) == ['p.npz']


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads what Linux says about memory')
def test_expanding_takes_little_memory(tmp_path):
    script = ("import sys; from file import expand; most = lambda: int(open('/proc/self/status').read().split('VmHWM:')"
              "[1].split()[0]); before = most(); expand.expand(expand.PACKED, sys.argv[1]); print(most() - before)")
    printed = subprocess.run([sys.executable, '-c', script, str(tmp_path / 'c.npy')], check=True,
                             stdout=subprocess.PIPE, cwd=os.path.dirname(expand.HERE)).stdout
    assert int(printed) < 250 * 1024    # KiB; the file has 525 MiB


@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), OSError(30, 'Read-only file system')])
def test_without_room_for_it_the_network_is_made_in_memory(small_package, monkeypatch, capsys, error):
    def fail(*_):
        raise error
    expected = checkpoint.load(None, {'second': (4, 5)})
    os.remove(checkpoint.EXPANDED)
    monkeypatch.setattr(expand, 'write', fail)
    assert_equal(checkpoint.load(None, {'second': (4, 5)}), expected)
    assert error.strerror in capsys.readouterr().err
    assert os.listdir(str(small_package)) == ['p.npz']


def test_a_run_that_is_cut_leaves_nothing_half_written(small_package, monkeypatch):
    def cut(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(expand, 'write', cut)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.load()
    assert os.listdir(str(small_package)) == ['p.npz']


def test_what_a_killed_run_left_is_swept_up(small_package):
    old, new = str(small_package / 'c.npy.old.part'), str(small_package / 'c.npy.new.part')
    saved(old, b''), saved(new, b'')
    os.utime(old, (1, 1))
    checkpoint.load()
    assert not os.path.exists(old) and os.path.exists(new)    # the new one may be another run's, at work


@pytest.mark.parametrize('damage', [lambda content: content[:-100], lambda content: b'', lambda content: b'text'])
def test_a_damaged_package_is_named(small_package, damage):
    content = open(checkpoint.PACKED, 'rb').read()
    saved(checkpoint.PACKED, damage(content))
    with pytest.raises(checkpoint.CheckpointError, match='p.npz is damaged'):
        checkpoint.load()
    os.remove(checkpoint.PACKED)
    with pytest.raises(checkpoint.CheckpointError, match='p.npz is not there'):
        checkpoint.load()


def test_expanding_by_hand_prints_the_hash(small_package):
    out = str(small_package / 'by hand.npy')
    script = os.path.join(expand.HERE, 'expand.py')
    printed = subprocess.run([sys.executable, script, '--packed', checkpoint.PACKED, '--out', out], check=True,
                             stdout=subprocess.PIPE).stdout.decode()
    assert printed.split() == [hashlib.sha256(open(out, 'rb').read()).hexdigest(), 'by', 'hand.npy']
    assert_equal(checkpoint.read(out), checkpoint.load())
