"""From the packed file of the trained network to the one that the handbook's script loads.

    python file/making/expand.py [--packed FILE.npz] [--out FILE.npy]

main.py does this by itself when vgg16_ckpt.npy is not there.  Packed (vgg16_flowers.npz), every weight is one signed
byte q and every output channel has a scale s:

    weight = sign(q) * q * q * s

Squaring spends the 255 steps where the weights are, near zero.  q * q has at most 14 bits and s has 10, so that
the product is exact in float32: every machine expands the same file to the same bits.
"""
import argparse
import glob
import hashlib
import os
import struct
import sys
import tempfile
import time
import zipfile
import zlib

import numpy as np

FILE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PACKED = os.path.join(FILE, 'vgg16_flowers.npz')
EXPANDED = os.path.join(FILE, 'vgg16_ckpt.npy')
SCALE_BITS = 10
PLANE = 7 * 7    # fullyconnect1 sees 512 planes of 7x7 numbers; packed, it has one weight for each plane
BLOCK = 2**23    # bytes that are written at a time: fullyconnect1 alone has 411 MB, which would have to be in memory


class PackedError(Exception):
    """A packed file that cannot be used; the text says which, what is wrong and what to do."""


# ------------------------------------------------------------------------------------------ packed and back

def pack(weight):
    """Bytes and scales that stand for a weight.

    Parameters
    ----------
    weight : ndarray (out, ...), float

    Returns
    -------
    tuple of ndarray
        q, int8 of the shape of weight, and scale, float32 (out,).

    Examples
    --------
    >>> q, scale = pack([[1.0, 0.25, -0.01, 0.0]])
    >>> q
    array([[127,  63, -13,   0]], dtype=int8)
    >>> unpack(q, scale).round(2)
    array([[ 1.  ,  0.25, -0.01,  0.  ]], dtype=float32)
    """
    rows = np.asarray(weight, dtype=np.float64).reshape(len(weight), -1)
    mantissa, exponent = np.frexp(np.abs(rows).max(axis=1) / 127**2)
    scale = np.ldexp(np.ceil(mantissa * 2**SCALE_BITS) / 2**SCALE_BITS, exponent)
    size = np.abs(rows) / np.where(scale > 0, scale, 1)[:, None]
    low = np.floor(np.sqrt(size))
    q = np.where(size - low**2 > (low + 1)**2 - size, low + 1, low)    # the nearer of the two squares
    return (np.sign(rows) * q).astype(np.int8).reshape(np.shape(weight)), scale.astype(np.float32)


def unpack(q, scale):
    """The float32 weight that bytes and scales stand for; exact (see above)."""
    square = q.astype(np.int16)
    square *= np.abs(square)
    return square.astype(np.float32) * scale.reshape((-1,) + (1,) * (q.ndim - 1))


def packed_layers(path):
    """Yield (layer, weight, bias), float32, of a packed file, in the network's order.

    A weight of three axes is a view that repeats each number along the last one, see `as_in_network`.
    """
    try:
        with np.load(path, allow_pickle=False) as packed:
            names = [key[:-len('.q')] for key in packed.files if key.endswith('.q')]
            for name in names:
                weight = unpack(packed[name + '.q'], packed[name + '.scale'])
                if name == 'fullyconnect1':
                    weight = np.broadcast_to(weight[:, :, None], weight.shape + (PLANE,))
                yield name, weight, packed[name + '.bias']
    except FileNotFoundError:
        raise PackedError('%s is not there: fetch it again with the project' % path)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise PackedError('%s is damaged (%s): fetch it again with the project' % (path, error))


def as_in_network(weight):
    """The weight, or some rows of it, without the axis that repeats numbers."""
    return weight.reshape(len(weight), -1) if weight.ndim == 3 else weight


def checkpoint(path):
    """The checkpoint of a packed file, in memory: {layer: {'weight': ndarray, 'bias': ndarray}}."""
    return {name: {'weight': as_in_network(weight), 'bias': bias} for name, weight, bias in packed_layers(path)}


# ----------------------------------------------------------------------------------------- writing a pickle

# A pickle is a program of one-byte instructions.  Written by hand, it has the same bytes under every Python and
# numpy; numpy 2 would name the module numpy._core, which numpy 1 does not have, while both have numpy.core.
_RECONSTRUCT = b'cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R'


def _text(text):
    return b'X' + struct.pack('<I', len(text)) + text.encode('ascii')


def _array_head(shape, kind, order, flags):
    """Everything of a pickled array that comes before its contents."""
    sizes = b''.join(b'J' + struct.pack('<i', size) for size in shape)
    dtype = (b'cnumpy\ndtype\n' + _text(kind) + b'\x89\x88\x87R(K\x03' + _text(order) +
             b'NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK' + flags + b'tb')
    return _RECONSTRUCT + b'(K\x01(' + sizes + b't' + dtype + b'\x89'


def _filler(size):
    """Instructions of that many bytes, or 64 more, that push some zeros and drop them."""
    size += 64 if size < 3 else 0
    return b'C' + bytes([size - 3]) + bytes(size - 3) + b'0'


def write(file, layers):
    """Write a checkpoint as np.save does, with the same bytes on every machine.

    Parameters
    ----------
    file : binary file
    layers : iterable of (name, weight, bias)
        Taken one after another, so that not all have to be in memory; see `packed_layers`.
    """
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (), }"
    header = header.ljust(128 - 10 - 1) + b'\n'
    file.write(b'\x93NUMPY\x01\x00' + struct.pack('<H', len(header)) + header)
    file.write(b'\x80\x03' + _array_head((), 'O8', '|', b'\x3f') + b']}(')
    for name, weight, bias in layers:
        file.write(_text(name) + b'}(')
        for key, array in (('weight', weight), ('bias', bias)):
            shape = array.shape[:1] + as_in_network(array[:1]).shape[1:]
            head = _text(key) + _array_head(shape, 'f4', '<', b'\x00')
            file.write(_filler(-(file.tell() + len(head) + 5) % 64) + head)    # the numbers start at a multiple of 64
            file.write(b'B' + struct.pack('<I', 4 * array.size))
            rows = max(1, BLOCK * len(array) // max(1, 4 * array.size))
            for first in range(0, len(array), rows):
                block = np.ascontiguousarray(array[first:first + rows], dtype='<f4')
                file.write(memoryview(block).cast('B'))
            file.write(b'tb')
        file.write(b'u')
    file.write(b'uatb.')


def expand(packed, expanded):
    """Write the expanded file of a packed one: under another name first, so that it is whole or not there.

    Raises
    ------
    OSError
        If it cannot be written; nothing is left then.
    """
    for left in glob.glob(glob.escape(expanded) + '.*.part'):    # of a run that was killed
        if time.time() - os.path.getmtime(left) > 600:
            os.remove(left)
    folder, name = os.path.split(expanded)
    handle, part = tempfile.mkstemp(prefix=name + '.', suffix='.part', dir=folder)
    try:
        with os.fdopen(handle, 'wb') as file:
            write(file, packed_layers(packed))
        os.chmod(part, 0o644)
        os.replace(part, expanded)
    except BaseException:
        os.remove(part)
        raise


def exit_if_there(script, path):
    """End a script before its work where that would overwrite a file."""
    if os.path.lexists(path):
        sys.exit('%s: %s is there already: remove it first, or name another file' % (script, path))


def main():
    parser = argparse.ArgumentParser(description='Expand the packed network into a checkpoint; print its SHA-256.')
    parser.add_argument('--packed', default=PACKED, help='default: %(default)s')
    parser.add_argument('--out', default=EXPANDED, help='default: %(default)s')
    arguments = parser.parse_args()
    exit_if_there('expand.py', arguments.out)
    try:
        expand(arguments.packed, os.path.abspath(arguments.out))
        digest = hashlib.sha256()
        with open(arguments.out, 'rb') as file:
            for block in iter(lambda: file.read(1 << 24), b''):
                digest.update(block)
        print('%s  %s' % (digest.hexdigest(), os.path.basename(arguments.out)))
    except (PackedError, OSError) as error:
        sys.exit('expand.py: %s' % error)


if __name__ == '__main__':
    main()
