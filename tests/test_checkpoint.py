"""Checkpoints: exact to the bit, readable by plain numpy, and never more than data."""
import base64
import datetime
import hashlib
import io
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections import OrderedDict, defaultdict

import numpy as np
import pytest

import main
from file.making import expand
from vgg import VGG16

SHAPES, VGG16_SHAPES = {'first': (3, 2, 2, 2), 'second': (4, 5)}, main.SHAPES


@pytest.fixture(autouse=True)
def small_network(monkeypatch):
    """VGG16's table of shapes is that of two small layers."""
    monkeypatch.setattr(main, 'SHAPES', SHAPES)


def small():
    rng = np.random.RandomState(3)
    return {name: {'weight': rng.randn(*shape).astype(np.float32), 'bias': rng.randn(shape[0]).astype(np.float32)}
            for name, shape in SHAPES.items()}


def as_npy(payload):
    """An .npy file around a pickle."""
    file = io.BytesIO()
    np.save(file, np.array({}, dtype=object))
    return file.getvalue()[:file.getvalue().index(b'\x80')] + payload


def npy(content, protocol=3):
    return as_npy(pickle.dumps(np.array(content, dtype=object), protocol=protocol))


def load(folder, content):
    """What main.py reads in a file of that content."""
    (folder / 'c.npy').write_bytes(content)
    return main.load_checkpoint(str(folder / 'c.npy'))


def assert_equal(ckpt, expected):
    assert list(ckpt) == list(expected)
    for name in expected:
        for key in ('weight', 'bias'):
            np.testing.assert_array_equal(ckpt[name][key], expected[name][key])


# -------------------------------------------------------------------------------------- packing and expanding

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


@pytest.mark.slow
def test_the_shipped_checkpoint_has_one_hash_and_fits_the_network(monkeypatch):
    monkeypatch.setattr(main, 'SHAPES', VGG16_SHAPES)
    ckpt = main.load_checkpoint()    # expands it where it is not there
    digest = hashlib.sha256()
    with open(main.CHECKPOINT, 'rb') as file:
        for block in iter(lambda: file.read(1 << 24), b''):
            digest.update(block)
    with open(os.path.join(expand.FILE, 'vgg16_ckpt.sha256')) as file:
        assert digest.hexdigest() == file.read().split()[0]
    assert_equal(np.load(main.CHECKPOINT, allow_pickle=True).item(), ckpt)
    assert [name for name in VGG16().graph_layers if 'conv' in name or 'connect' in name] == list(main.SHAPES)
    assert sum(array.size for layer in ckpt.values() for array in layer.values()) == 134276932
    assert all(type(array) is np.ndarray and array.dtype == np.float32 and array.flags.carray
               for layer in ckpt.values() for array in layer.values())
    assert all(layer['weight'].any(axis=tuple(range(1, layer['weight'].ndim))).all() for layer in ckpt.values())
    assert os.path.getsize(main.PACKED) <= 40 * 10**6
    with np.load(main.PACKED, allow_pickle=False) as packed:
        assert all(packed[key].dtype in (np.int8, np.float32) for key in packed.files)


@pytest.fixture
def small_package(tmp_path, monkeypatch):
    """A packed file of one small layer in a folder of its own."""
    q, scale = expand.pack(small()['second']['weight'])
    np.savez_compressed(str(tmp_path / 'p.npz'),
                        **{'second.q': q, 'second.scale': scale, 'second.bias': small()['second']['bias']})
    monkeypatch.setattr(main, 'SHAPES', {'second': (4, 5)})
    monkeypatch.setattr(main, 'PACKED', str(tmp_path / 'p.npz'))
    monkeypatch.setattr(main, 'CHECKPOINT', str(tmp_path / 'c.npy'))
    return tmp_path


def test_it_is_expanded_once_and_said(small_package, capsys):
    for name in ('old', 'new'):
        (small_package / ('c.npy.%s.part' % name)).write_bytes(b'')
    os.utime(str(small_package / 'c.npy.old.part'), (1, 1))
    ckpt = main.load_checkpoint()
    assert 'vgg16_ckpt.npy is not there' in capsys.readouterr().err
    # what a killed run left is swept up; the new one may be another run's, at work
    assert sorted(os.listdir(str(small_package))) == ['c.npy', 'c.npy.new.part', 'p.npz']
    os.remove(main.PACKED)
    assert_equal(main.load_checkpoint(), ckpt)
    assert capsys.readouterr().err == ''
    os.remove(main.CHECKPOINT)
    with pytest.raises(main.InputError, match='c.npy: cannot be read'):    # neither is there
        main.load_checkpoint()


@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), KeyboardInterrupt()])
def test_nothing_half_written_is_left_and_without_room_it_is_made_in_memory(small_package, monkeypatch, capsys, error):
    def fail(*_):
        raise error
    expected = main.load_checkpoint()
    os.remove(main.CHECKPOINT)
    monkeypatch.setattr(expand, 'write', fail)
    if isinstance(error, OSError):
        assert_equal(main.load_checkpoint(), expected)
        assert error.strerror in capsys.readouterr().err
    else:
        with pytest.raises(KeyboardInterrupt):
            main.load_checkpoint()
    assert os.listdir(str(small_package)) == ['p.npz']


@pytest.mark.parametrize('damage', [lambda content: content[:-100], lambda content: b'', lambda content: b'text'])
def test_a_damaged_package_is_named(small_package, damage):
    packed = small_package / 'p.npz'
    packed.write_bytes(damage(packed.read_bytes()))
    with pytest.raises(main.InputError, match='p.npz is damaged'):
        main.load_checkpoint()


def test_expanding_by_hand_prints_the_hash_and_overwrites_nothing(small_package):
    out = small_package / 'by_hand.npy'
    command = [sys.executable, expand.__file__, '--packed', main.PACKED, '--out', str(out)]
    printed = subprocess.check_output(command).decode()
    assert printed.split() == [hashlib.sha256(out.read_bytes()).hexdigest(), 'by_hand.npy']
    assert_equal(np.load(str(out), allow_pickle=True).item(), main.load_checkpoint())
    out.write_bytes(b'mine')
    assert b'is there already' in subprocess.run(command, stderr=subprocess.PIPE).stderr
    assert out.read_bytes() == b'mine'


def test_the_courses_own_folder_is_enough(tmp_path):
    """file/ holds a photo and a checkpoint, and no code of ours."""
    for name in ('main.py', 'vgg.py', 'layer.py', 'loss.py'):
        shutil.copy(os.path.join(main.HERE, name), str(tmp_path))
    (tmp_path / 'file').mkdir()
    (tmp_path / 'file' / 'vgg16_ckpt.npy').write_bytes(npy(small()))
    shutil.copy(main.IMAGE, str(tmp_path / 'file'))
    script = 'import main; main.SHAPES = %r; print(list(main.load_checkpoint())); main.read_image(main.IMAGE)' % SHAPES
    printed = subprocess.check_output([sys.executable, '-c', script], cwd=str(tmp_path))
    assert printed.decode().strip() == str(list(SHAPES))


# ------------------------------------------------------------------------------------- what others have saved

@pytest.mark.parametrize('protocol', [protocol for protocol in (2, 3, 4, 5) if protocol <= pickle.HIGHEST_PROTOCOL])
@pytest.mark.parametrize('change', [
    lambda a: a, np.asfortranarray, lambda a: a.astype('>f4'), lambda a: a.astype(np.float64),
    lambda a: a[::-1].copy()[::-1], lambda a: a.swapaxes(0, a.ndim // 2).copy().swapaxes(0, a.ndim // 2)])
def test_every_way_in_which_numpy_pickles_an_array(tmp_path, protocol, change, capsys):
    content = {name: {key: change(array) for key, array in layer.items()} for name, layer in small().items()}
    ckpt = load(tmp_path, npy(content, protocol))
    assert_equal(ckpt, small())
    for layer in ckpt.values():
        for array in layer.values():
            assert array.dtype == np.float32 and array.dtype.isnative and array.flags.carray
    if content['second']['weight'].dtype == np.float64:
        assert 'converted to plain float32: first.weight' in capsys.readouterr().err


@pytest.mark.parametrize('core', [b'numpy.core', b'numpy._core'])
def test_module_names_of_both_numpys(tmp_path, core):
    assert_equal(load(tmp_path, re.sub(br'numpy\._?core', core, npy(small(), 2))), small())


class Metadata(OrderedDict):
    """As torch's state_dict, which has more than its items."""

    def __reduce__(self):
        return OrderedDict, (), {'_metadata': {}}, None, iter(self.items())


def flat(prefix=''):
    return {'%s%s.%s' % (prefix, name, key): array for name, layer in small().items() for key, array in layer.items()}


OTHERS = {    # content, what is said of it
    'OrderedDict': (OrderedDict((name, OrderedDict(layer)) for name, layer in small().items()), ''),
    'defaultdict': (defaultdict(dict, small()), ''),
    'state_dict of torch, as arrays': (Metadata(flat()), 'read first.weight as the weight of first'),
    'np.str_ keys': ({np.str_(name): layer for name, layer in small().items()}, ''),
    'bytes for keys': ({name.encode(): layer for name, layer in small().items()}, 'read first.weight as the weight of'),
    'numbers beside the layers': (dict(small(), epoch=np.int64(3), loss=np.float32(0.5)), 'left aside: epoch, loss'),
    'numbers beside the arrays': (dict(small(), first=dict(small()['first'], s=np.float64(2))), 'left aside: first.s'),
    'matrix': (dict(small(), second={key: np.matrix(array) for key, array in small()['second'].items()}), ''),
    'module.': ({'module.' + name: layer for name, layer in small().items()}, 'read module.first.weight as the'),
    'flat': (flat(), 'read first.weight as the weight of first'),
    'flat with module.': (flat('module.'), 'module.second.bias as the bias of second'),
    'under state_dict': ({'state_dict': small()}, 'read state_dict.first.weight as the weight'),
    'flat under state_dict': ({'state_dict': flat(), 'epoch': 3}, 'read state_dict.first.weight as the weight'),
}


@pytest.mark.parametrize('protocol', [protocol for protocol in (2, 3, 4, 5) if protocol <= pickle.HIGHEST_PROTOCOL])
def test_large_arrays_stay_in_their_file_and_may_be_written_to(tmp_path, protocol):
    """In either order, wherever they lie, and the same one under two names; the file keeps its bytes."""
    rows = np.arange(600000, dtype=np.float32).reshape(600, 1000)
    columns = np.asfortranarray(rows + 1)
    content = npy({'rows': rows, 'odd': 'x', 'columns': columns, 'again': rows}, protocol)
    (tmp_path / 'c.npy').write_bytes(content)
    found = main.read_checkpoint(str(tmp_path / 'c.npy'))
    assert found['again'] is found['rows'] and found['rows'].flags.aligned
    np.testing.assert_array_equal(found['rows'], rows)
    np.testing.assert_array_equal(found['columns'], columns)
    found['rows'][:] = 0
    assert (tmp_path / 'c.npy').read_bytes() == content


@pytest.mark.parametrize('name', sorted(OTHERS))
@pytest.mark.parametrize('protocol', [2, 3, 4])
def test_what_is_certain_is_loaded_and_what_was_changed_is_said(tmp_path, name, protocol, capsys):
    content, words = OTHERS[name]
    assert_equal(load(tmp_path, npy(content, protocol)), small())
    out, err = capsys.readouterr()
    assert words in err and bool(words) == bool(err) and out == ''


def test_memory_maps_and_no_file(tmp_path):
    for name, array in flat().items():
        array.tofile(str(tmp_path / name))
    content = {name: np.memmap(str(tmp_path / name), np.float32, shape=array.shape) for name, array in flat().items()}
    assert_equal(load(tmp_path, npy(content)), small())
    for path in (str(tmp_path / 'absent.npy'), str(tmp_path)):
        with pytest.raises(main.InputError, match='cannot be read'):
            main.load_checkpoint(path)


# np.save of numpy 1.16 under Python 2: an OrderedDict in another, keys of several kinds, numbers beside the arrays
PYTHON2 = (
    'gAJjbnVtcHkuY29yZS5tdWx0aWFycmF5Cl9yZWNvbnN0cnVjdApxAWNudW1weQpuZGFycmF5CnECSwCFVQFih1JxAyhLASljbnVtcHkKZHR5cGUKcQ'
    'RVAk84SwBLAYdScQUoSwNVAXxOTk5K/////0r/////Sz90YoldcQZjY29sbGVjdGlvbnMKT3JkZXJlZERpY3QKcQddcQgoXXEJKFgFAAAAZmlyc3Rx'
    'CmgHXXELKF1xDChjbnVtcHkuY29yZS5tdWx0aWFycmF5CnNjYWxhcgpxDWgEVQJTNksASwGHUnEOKEsDVQF8Tk5OSwZLAUsAdGJVBndlaWdodIZScQ'
    '9oAWgCSwCFVQFih1JxEChLAUsBSwKGaARVAmY0SwBLAYdScREoSwNVATxOTk5K/////0r/////SwB0YolVCAAAAAAAAAA/dGJlXXESKGgNaARVAlU0'
    'SwBLAYdScRMoSwNVATxOTk5LEEsESwh0YlUQYgAAAGkAAABhAAAAcwAAAIZScRRoAWgCSwCFVQFih1JxFShLAUsBhWgRiVUEAAAAAHRiZWWFUnEWZV'
    '1xFyhVBWVwb2NocRhoDWgEVQJpOEsASwGHUnEZKEsDVQE8Tk5OSv////9K/////0sAdGJVCAMAAAAAAAAAhlJxGmVdcRsoVQRsb3NzcRxoDWgRVQQA'
    'AAA/hlJxHWVlhVJxHmF0Yi4=')


def test_what_python_2_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(main, 'SHAPES', {'first': (1, 2)})
    ckpt = load(tmp_path, as_npy(base64.b64decode(PYTHON2)))
    assert_equal(ckpt, {'first': {'weight': [[0, 0.5]], 'bias': [0]}})


# ------------------------------------------------------------------------------------------------- accidents

def changed(**others):
    return npy(dict(small(), **others))


def layer(weight=np.zeros((4, 5), np.float32), bias=np.zeros(4, np.float32)):
    return {'weight': weight, 'bias': bias}


def of_kind(dtype):
    return changed(second=layer(weight=np.zeros((4, 5)).astype(dtype)))


ITSELF = small()
ITSELF['first']['weight'] = ITSELF
DEEP = {}
for _ in range(40):
    DEEP = {'a': DEEP, 'b': DEEP}

# What has ndarray make an array of objects out of eight bytes, as if they were pointers, or tells a dtype to let it.
FALSE_ARRAY = b'\x80\x03cnumpy\nndarray\n(K\x01\x85X\x01\x00\x00\x00OC\x08AAAAAAAAtR.'
FALSE_DTYPE = (b'\x80\x03cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85C\1b\x87R(K\1)cnumpy\ndtype\n'
               b'X\x02\x00\x00\x00O8\x89\x88\x87R(K\x03X\x01\x00\x00\x00|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb'
               b'\x89C\x08AAAAAAAAtb.')
ACCIDENTS = {
    'program': (as_npy(b'\x80\x04\x8c\5posix\x8c\6system\x93\x8c\7echo ha\x85R.'), 'asks to run posix.system'),
    'program of protocol 0': (as_npy(b"cos\nsystem\n(S'echo ha'\ntR."), 'asks to run os.system'),
    'objects made of bytes': (as_npy(FALSE_ARRAY), 'damaged'),
    'objects of a false dtype': (as_npy(FALSE_DTYPE), 'damaged'),
    'objects that are not there': (npy({}).replace(b')cnumpy\n', b'J\0\0\0\1\x85cnumpy\n'), 'damaged'),
    'empty': (b'', 'empty'),
    'cut at the end': (npy(small())[:-3], 'cut short or damaged'),
    'not built': (as_npy(b'\x80\x03K\x01K\x02s.'), r'cut short or damaged \(\w'),
    'git lfs pointer': (b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n', 'git lfs pull'),
    'web page': (b'\n<!DOCTYPE html><html></html>', 'web page'),
    'archive': (b'PK\x03\x04' + bytes(100), 'archive'),
    'bare pickle': (pickle.dumps(small(), protocol=2), 'bare pickle'),
    'newer protocol': (as_npy(b'\x80\x63}.'), 'written by a newer Python .*99'),
    'text': (b'hello', 'no .npy file'),
    'plain array': (as_npy(b'').replace(b'|O', b'f4') + bytes(4), 'holds an array of float32, not a dict'),
    'list': (npy([1, 2]), 'a dict of layers expected, got ndarray'),
    'missing layer': (npy({'first': small()['first']}), r'lacks second.weight, second.bias$'),
    'other names': (npy({'conv1': small()['first'], 'fc': 3}), 'lacks .*; it has conv1.weight, conv1.bias, fc'),
    'unknown layer': (changed(third=layer()), 'unknown layers: third.weight, third.bias'),
    'one layer twice': (changed(**{'module.first': layer()}), 'has first.weight twice'),
    'no bias': (changed(second={'weight': np.zeros((4, 5))}), 'lacks second.bias'),
    'list for an array': (changed(second=layer(weight=[[1.0]])), 'second.weight: an array expected, got list'),
    'wrong shape': (changed(second=layer(weight=np.zeros((5, 4)))), r'weight: shape \(4, 5\) expected, got \(5, 4\)'),
    'nan': (changed(second=layer(bias=np.array([0, 1, np.nan, 2]))), 'second.bias: has numbers that are not finite'),
    'too large for float32': (changed(second=layer(bias=np.full(4, 1e300))), 'not finite in float32'),
    'whole numbers': (of_kind(int), 'second.weight: an array of int64, float32 is expected'),
    'complex numbers': (of_kind(complex), 'an array of complex128'),
    'long doubles': (of_kind(np.longdouble), 'an array of float128, float32 is expected'),
    'dates': (of_kind('M8[D]'), 'an array of datetime64'),
    'objects': (of_kind(object), 'an array of object'),
    'records': (of_kind('f4,f4'), r'holds an array of \|V8'),
    'a date': (changed(saved=datetime.date(2022, 8, 23)), 'holds dates'),
    'torch tensors': (as_npy(b'\x80\x03ctorch._utils\n_rebuild_tensor_v2\n.'), r'torch tensors: .*tensor.numpy\(\)'),
    'bfloat16': (as_npy(b'\x80\x03cml_dtypes\nbfloat16\n.'), r'bfloat16 .*astype\(np.float32\)'),
    'a dict that contains itself': (npy(ITSELF), 'first.weight: an array expected, got dict'),
    'a key that is never hashed': (as_npy(b'\x80\3}K\0q\x000' + 40 * b'h\0h\0\x86q\x000' + b'h\0K\1s.'), 'no name'),
    'a dict of 40 levels': (npy(DEEP), 'lacks first.weight, .*; it has a.a, a.b, b.a, b.b'),
}


@pytest.mark.parametrize('name', sorted(ACCIDENTS))
def test_accidents_get_one_clear_message(tmp_path, name, capfd):
    content, words = ACCIDENTS[name]
    with pytest.raises(main.InputError, match=words) as error:
        load(tmp_path, content)
    assert str(error.value).startswith(str(tmp_path / 'c.npy') + ': ') and '\n' not in str(error.value)
    assert capfd.readouterr() == ('', '')


def test_flipped_bytes_give_a_checkpoint_or_the_clear_error(tmp_path):
    rng = np.random.RandomState(11)
    good = [npy(small(), protocol) for protocol in (2, 3, 4)] + [npy(content) for content, _ in OTHERS.values()]
    good += [content for content, _ in ACCIDENTS.values() if len(content) > 500]
    loaded = 0
    for trial in range(2000):
        content = bytearray(good[trial % len(good)])
        for _ in range(rng.randint(1, 4)):
            content[rng.randint(len(content))] = rng.randint(256)
        if trial % 7 == 0:
            del content[rng.randint(len(content)):]
        try:
            load(tmp_path, bytes(content))
            loaded += 1
        except main.InputError:
            pass
    assert 100 < loaded < 1900
