"""Reading a checkpoint: the arrays in it, and nothing else.

A checkpoint is what np.save writes of a dict {layer: {'weight': ..., 'bias': ...}}: a pickle.  Such a file can run any
program when it is loaded, and this one is passed around a class.  `read` takes the arrays out of it and refuses
the rest; `check` compares them with a network before that is touched; `load` does both, and finds the file.
"""
import mmap
import os
import pickle
import struct
import sys
import threading

import numpy as np

from file.expand import EXPANDED, PACKED, CheckpointError, as_in_network, expand, packed_layers

IN_PLACE = 1 << 20    # bytes from which on an array is not copied out of its file


class _Dtype(object):
    """Stands in for numpy.dtype while a pickle is read: two strings."""

    def __init__(self, kind, *_):
        self.kind, self.order = kind, '='

    def __setstate__(self, state):
        self.order = state[1]


class _Array(object):
    """Stands in for an array while a pickle is read: checks its state, and computes nothing."""

    def __init__(self, *_):
        self.value = None

    def __setstate__(self, state):
        _, shape, dtype, fortran, contents = state
        self.value = contents[0] if isinstance(contents, list) else _array(contents, dtype, shape, fortran)


def _array(contents, dtype, shape, fortran):
    """An ndarray on the bytes of a pickle."""
    if dtype.kind not in ('f2', 'f4', 'f8'):
        raise pickle.UnpicklingError('an array of %s, not of floating-point numbers' % dtype.kind)
    if isinstance(contents, str):    # protocol 2
        contents = contents.encode('latin-1')
    array = np.frombuffer(contents, dtype=dtype.order.replace('|', '=') + dtype.kind)
    if not (array.flags.aligned and array.flags.writeable):
        array = array.copy()
    return array.reshape(shape, order='F' if fortran else 'C')


def _frombuffer(contents, dtype, shape, order, *_):
    """What numpy's pickles of protocol 5 call."""
    made = _Array()
    made.value = _array(contents, dtype, shape, order == 'F')
    return made


class _Reader(pickle._Unpickler):
    """An unpickler that knows the few names that an array needs, each answered by a stand-in of this file.

    It is the one of the standard library that is written in Python, so that the bytes of a large array can stay
    where they are, in a private map of the file: neither read before they are needed nor held twice.
    """

    KNOWN = {('numpy', 'ndarray'): _Array, ('numpy', 'dtype'): _Dtype,
             ('_codecs', 'encode'): lambda text, encoding: text.encode('latin-1')}
    for module in ('numpy.core', 'numpy._core'):
        KNOWN[module + '.multiarray', '_reconstruct'] = _Array
        KNOWN[module + '.numeric', '_frombuffer'] = _frombuffer

    def __init__(self, mapped):
        super().__init__(mapped)
        self.mapped = mapped

    def find_class(self, module, name):
        if (module, name) not in self.KNOWN:
            raise CheckpointError('it asks to run %s.%s, which no checkpoint needs: do not use it' % (module, name))
        return self.KNOWN[module, name]

    def _load_bytes(self):
        size, = struct.unpack('<I', self.read(4))
        if size < IN_PLACE:
            self.append(self.read(size))
            return
        start = self.mapped.tell()
        self.mapped.seek(size, os.SEEK_CUR)    # ValueError past the end
        self.append(memoryview(self.mapped)[start:start + size])

    dispatch = dict(pickle._Unpickler.dispatch)
    dispatch[pickle.BINBYTES[0]] = _load_bytes


_ACCIDENTS = (
    (b'', 'is empty: fetch it again'),
    (b'version https://git-lfs', 'is a Git LFS pointer, not the file itself: run `git lfs pull`'),
    (b'<', 'is a web page, not a checkpoint: the download went wrong, fetch it again'),
    (b'PK', 'is an archive (.npz, or saved by torch), not an .npy file: save a dict with np.save'),
    (b'\x80', 'is a bare pickle (saved by torch or pickle.dump), not an .npy file: save a dict with np.save'),
)


def read(path):
    """The checkpoint in an expanded file.

    Parameters
    ----------
    path : str

    Returns
    -------
    dict
        {layer: {'weight': ndarray, 'bias': ndarray}}, float32, not yet compared with a network (see `check`).

    Raises
    ------
    CheckpointError
        For a file that is no such checkpoint, or that wants to do more than hold arrays.
    """
    try:
        with open(path, 'rb') as opened:
            start = opened.read(64)
            for magic, text in _ACCIDENTS:
                if start.lstrip().startswith(magic) if magic else not start:
                    raise CheckpointError('it %s' % text)
            file = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
            try:
                version = np.lib.format.read_magic(file)
                header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                dtype = header[version](file)[2]
            except (ValueError, KeyError, SyntaxError) as error:
                raise CheckpointError('it is no .npy file (%s): save a dict with np.save' % error)
            if dtype != object:
                raise CheckpointError('it holds an array of %s, not a dict of layers' % dtype)
            content = _Reader(file).load()
    except CheckpointError as error:
        raise CheckpointError('%s: %s' % (path, error))
    except FileNotFoundError:
        raise CheckpointError('%s: no such file' % path)
    except IsADirectoryError:
        raise CheckpointError('%s: is a folder, an .npy file is expected' % path)
    except OSError as error:
        raise CheckpointError('%s: cannot be read (%s)' % (path, error.strerror))
    except Exception as error:    # whatever damaged bytes make an unpickler raise
        raise CheckpointError('%s: is cut short or damaged (%s): fetch it again' % (path, error or type(error).__name__))
    return _plain(content)


def _plain(content):
    """Replace the stand-ins by what they stood for."""
    if isinstance(content, _Array):
        return _plain(content.value)
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items()}
    return content


def check(ckpt, shapes, path):
    """Compare a checkpoint with a network before the network is touched.

    Parameters
    ----------
    ckpt : dict
    shapes : dict
        {layer: shape of its weight}.
    path : str
        Named in errors.

    Returns
    -------
    dict
        The checkpoint in the network's order, all arrays C-contiguous float32.

    Raises
    ------
    CheckpointError
        Naming the layer and what is wrong with it.
    """
    if not isinstance(ckpt, dict):
        raise CheckpointError('%s: a dict of layers expected, got %s' % (path, type(ckpt).__name__))
    for names, text in ((set(shapes) - set(ckpt), 'lacks'), (set(ckpt) - set(shapes), 'has unknown layers')):
        if names:
            raise CheckpointError('%s: %s %s' % (path, text, ', '.join(sorted(map(str, names)))))
    checked, converted = {}, []
    for name, shape in shapes.items():
        if not isinstance(ckpt[name], dict) or set(ckpt[name]) != {'weight', 'bias'}:
            raise CheckpointError("%s: %s: {'weight': ..., 'bias': ...} expected" % (path, name))
        checked[name] = {}
        for key, expected in (('weight', shape), ('bias', shape[:1])):
            array = ckpt[name][key]
            if not isinstance(array, np.ndarray):
                raise CheckpointError('%s: %s %s: an array expected, got %s' % (path, name, key, type(array).__name__))
            if array.shape != expected:
                raise CheckpointError('%s: %s %s: shape %s expected, got %s' % (path, name, key, expected, array.shape))
            if array.dtype != np.float32 or not array.flags.c_contiguous:
                converted.append('%s %s' % (name, key))
            with np.errstate(all='ignore'):
                array = np.ascontiguousarray(array, dtype=np.float32)
                # a sum is finite only if every number is; the slow look is for sums that overflow
                finite = np.isfinite(array.sum()) or np.isfinite(array).all()
            if not finite:
                raise CheckpointError('%s: %s %s: has numbers that are not finite' % (path, name, key))
            checked[name][key] = array
    if converted:
        print('%s: converted to C-ordered float32: %s' % (path, ', '.join(converted)), file=sys.stderr)
    return checked


def _expand_beside(meanwhile):
    """Make file/vgg16_ckpt.npy in a thread of its own while this one calls `meanwhile`, and wait for both."""
    from concurrent.futures import ThreadPoolExecutor    # only now: other runs start sooner without it
    ended = threading.Event()
    with ThreadPoolExecutor(1) as executor:
        made = executor.submit(expand, PACKED, EXPANDED, ended)
        try:
            meanwhile()
            made.result()
        finally:
            ended.set()    # by Ctrl-C, maybe: then the half of a file goes at once


def load(path=None, shapes=None, meanwhile=None):
    """The checkpoint of a network, from a file or from this package.

    Parameters
    ----------
    path : str, optional
        An .npy file in the handbook's format.  Without it, file/vgg16_ckpt.npy is read, and made of
        file/vgg16_flowers.npz first where it is not there; if it cannot be written, the network is made in memory.
    shapes : dict, optional
        {layer: shape of its weight} to `check` against.
    meanwhile : callable, optional
        Called while file/vgg16_ckpt.npy is made, which takes seconds where a disk is busy or far away; else it is not.

    Returns
    -------
    dict
        {layer: {'weight': ndarray, 'bias': ndarray}}, float32.
    """
    ckpt = None
    if path is None:
        path = EXPANDED
        if not os.path.exists(path):
            name = os.path.join('file', os.path.basename(path))
            print('%s is not there: making it of vgg16_flowers.npz, once' % name, file=sys.stderr)
            try:
                if meanwhile and os.path.exists(PACKED):    # else what is wrong is said at once
                    _expand_beside(meanwhile)
                else:
                    expand(PACKED, EXPANDED)
            except OSError as error:
                print('%s cannot be written (%s): going on without it' % (name, error.strerror), file=sys.stderr)
                path = PACKED
                ckpt = {name: {'weight': as_in_network(weight), 'bias': bias}
                        for name, weight, bias in packed_layers(PACKED)}
    ckpt = read(path) if ckpt is None else ckpt
    return ckpt if shapes is None else check(ckpt, shapes, path)
