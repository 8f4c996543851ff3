"""The lab's script: classify a picture with VGG16, compute the loss against a label, propagate back to the picture.

Standard output is the lab's transcript and nothing else; hints and errors go to standard error.
"""
import argparse
import mmap
import os
import pickle
import pickletools
import re
import sys
import tempfile
import time
import traceback

# OpenCV itself stops at a thousand million pixels, which would take 3 GB; a hundred million are enough for a flower.
os.environ.setdefault('OPENCV_IO_MAX_IMAGE_PIXELS', str(100 * 1000 * 1000))
import cv2                 # noqa: E402
import numpy as np         # noqa: E402

from vgg import VGG16      # noqa: E402
try:
    from loss import CrossEntropy
except ImportError:
    from layer import CrossEntropy    # where the course's older edition has it

HERE = os.path.dirname(os.path.realpath(__file__))
IMAGE = os.path.join(HERE, 'file', 'tulips_demo.jpg')
CHECKPOINT = os.path.join(HERE, 'file', 'vgg16_ckpt.npy')
PACKED = os.path.join(HERE, 'file', 'vgg16_flowers.npz')    # what this package makes a checkpoint of
CLASSES = ('daisy', 'roses', 'sunflowers', 'tulips')


class InputError(Exception):
    """Something given to the script that it cannot use; the text says what, what is wrong and what to do."""


# ------------------------------------------------------------------------------------------------- pictures

def resize_image(image, target_size):
    """Scale a picture so that it fits, and fill what is left at the bottom or on the right with grey 114.

    Parameters
    ----------
    image : ndarray (H, W, 3), uint8
    target_size : tuple of int
        Height and width of the result.

    Returns
    -------
    ndarray (height, width, 3), uint8

    Examples
    --------
    >>> resize_image(np.zeros((1, 2, 3), np.uint8), (2, 2))[:, :, 0]
    array([[  0,   0],
           [114, 114]], dtype=uint8)
    """
    h, w = image.shape[:2]
    th, tw = target_size
    scale = min(th / h, tw / w)
    oh, ow = max(1, round(h * scale)), max(1, round(w * scale))    # 3000x1 would shrink to 224x0
    image = cv2.resize(image, (ow, oh), interpolation=cv2.INTER_LINEAR).astype(np.uint8)
    new_image = np.ones((th, tw, 3), dtype=np.uint8) * 114
    new_image[:oh, :ow, :] = image
    return new_image


def read_image(img_path):
    """The picture in a file, as cv2.imread reads it: ndarray (H, W, 3), uint8, RGB; or InputError."""
    try:
        if os.path.isfile(img_path):
            open(img_path, 'rb').close()    # says why it cannot be opened; imread does not
            image = cv2.imread(img_path, cv2.IMREAD_COLOR)
        else:    # what comes through a pipe can be read once, and imread opens a file more than once
            with open(img_path, 'rb') as pipe, tempfile.TemporaryDirectory() as folder:
                copy = os.path.join(folder, 'picture')
                with open(copy, 'wb') as file:
                    file.write(pipe.read(1 << 29))    # /dev/zero never ends
                image = cv2.imread(copy, cv2.IMREAD_COLOR)
    except (OSError, ValueError) as error:
        raise InputError('%s: cannot be read (%s): give the path of a JPEG or PNG file' % (
            img_path, getattr(error, 'strerror', error)))
    except cv2.error:    # larger than OpenCV's own limits
        image = None
    if image is None:
        raise InputError('%s: is no picture that OpenCV can read, or a damaged or enormous one: '
                         'save it as JPEG or PNG and try again' % img_path)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def process_image(img_path):
    """The network's input made of a picture, handbook 2.5.1.

    Parameters
    ----------
    img_path : str or ndarray
        A file, or what `read_image` found in it.

    Returns
    -------
    ndarray (1, 3, 224, 224), float32
        (image - mean) / std of each channel.

    Raises
    ------
    InputError
        For a file that cannot be read or is no picture.
    """
    image = img_path if isinstance(img_path, np.ndarray) else read_image(img_path)
    image = resize_image(image, (224, 224))
    image = np.array(image, dtype=np.float32)
    image -= [125.307, 122.961, 113.8575]
    image /= [51.5865, 50.847, 51.255]
    return image.transpose((2, 0, 1))[None]


# ---------------------------------------------------------------------------------------------- checkpoints
# np.save pickles a dict {layer: {'weight': ..., 'bias': ...}}.  A pickle is a program, and Python's own unpickler runs
# whatever it names.  It is not enough to admit numpy's arrays alone: told so, these take a file's bytes for objects.

SHAPES = {    # of the weights; a bias has the first number
    'layer1_conv1': (64, 3, 3, 3), 'layer1_conv2': (64, 64, 3, 3),
    'layer2_conv1': (128, 64, 3, 3), 'layer2_conv2': (128, 128, 3, 3),
    'layer3_conv1': (256, 128, 3, 3), 'layer3_conv2': (256, 256, 3, 3), 'layer3_conv3': (256, 256, 3, 3),
    'layer4_conv1': (512, 256, 3, 3), 'layer4_conv2': (512, 512, 3, 3), 'layer4_conv3': (512, 512, 3, 3),
    'layer5_conv1': (512, 512, 3, 3), 'layer5_conv2': (512, 512, 3, 3), 'layer5_conv3': (512, 512, 3, 3),
    'fullyconnect1': (4096, 25088), 'fullyconnect2': (4096, 4096), 'fullyconnect3': (4, 4096)}
ACCIDENTS = {    # how a file begins, and what it is
    b'version https://git-lfs': 'is a Git LFS pointer, not the file itself: run `git lfs pull`',
    b'<': 'is a web page, not a checkpoint: the download went wrong, fetch it again',
    b'PK': 'is an archive (.npz, or saved by torch), not an .npy file: save a dict with np.save',
    b'\x80': 'is a bare pickle (saved by torch or pickle.dump), not an .npy file: save a dict with np.save'}
STRANGERS = {    # modules whose objects are found in the place of arrays
    'torch': 'holds torch tensors: save arrays instead, `tensor.numpy()`',
    'ml_dtypes': 'holds bfloat16 or the like, which numpy alone has not: save `array.astype(np.float32)`',
    'datetime': 'holds dates beside its arrays: save the arrays alone'}


def _array(contents, kind, shape=(), fortran=False, array=None):
    """An array of a pickle's contents, which have to be whole; where they are aligned, they are not copied."""
    kind = ''.join(kind)    # byte order and type
    if not re.match(r'[<>=|][biufcSUmMO]\d+\Z', kind):
        raise InputError('holds an array of %s: float32 is expected' % kind)
    array, dtype = np.empty(0) if array is None else array, np.dtype(kind)
    if len(contents) != np.prod(shape, dtype=float) * (1 if dtype == object else dtype.itemsize):
        raise ValueError('an array of another size')
    if isinstance(contents, memoryview):    # see Mapped
        return np.require(np.frombuffer(contents, dtype).reshape(shape, order='F' if fortran else 'C'), None, 'A')
    array.__setstate__((1, shape, dtype, fortran, contents))
    return array


def _array_of_buffer(contents, kind, shape, order, axes=None):
    """How arrays are pickled since protocol 5."""
    array = _array(bytes(contents), kind, shape, order == 'F')
    return array if axes is None else array.transpose(axes)


def _dict(pairs=()):
    pairs = list(pairs)
    if not all(isinstance(key, (str, bytes, int, float)) for key, _ in pairs):    # others may take for ever to hash
        raise ValueError('a key that is no name')
    return dict(pairs)


KNOWN = {    # what a name in a pickle stands for; None is never called, but told to others
    'numpy.core.multiarray._reconstruct': lambda *_: np.empty(0), 'numpy.ndarray': None, 'numpy.memmap': None,
    'numpy.core.memmap.memmap': None, 'numpy.matrix': None, 'numpy.matrixlib.defmatrix.matrix': None,
    'numpy.dtype': lambda kind, *_: ['=', kind], 'numpy.core.numeric._frombuffer': _array_of_buffer,
    'numpy.core.multiarray.scalar': lambda kind, contents: _array(contents, kind).item(),
    '_codecs.encode': lambda text, encoding: text.encode('latin-1'), 'collections.OrderedDict': _dict,
    'collections.defaultdict': lambda *_: {}, 'builtins.dict': None, '__builtin__.dict': None}
CONSTANTS = {'NONE': lambda: None, 'NEWTRUE': lambda: True, 'NEWFALSE': lambda: False,
             'EMPTY_DICT': dict, 'EMPTY_LIST': list, 'EMPTY_TUPLE': tuple}
TAKE = {'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3, 'APPEND': 1, 'SETITEM': 2, 'TUPLE': None, 'APPENDS': None,
        'SETITEMS': None}


class Mapped(mmap.mmap):
    """A private map of a file: half a gigabyte is not read and copied, but stays where it is until it is needed."""

    def read(self, size=-1):
        start = self.tell()
        if size < 1 << 20 or self[start - 5:start - 4] == b'T':    # Python 2's bytes, which pickletools decodes
            return super().read(size)
        self.seek(min(len(self), start + size))
        return memoryview(self)[start:start + size]


def unpickle(file):
    """What is pickled in a file: dicts, arrays, numbers and texts; nothing is called but what is KNOWN.

    A pickle's instructions work on a stack and a memory.  Raises whatever those of a damaged file lead to.
    """
    stack, marks, memory = [], [], {}
    for instruction, value, _ in pickletools.genops(file):
        name = instruction.name
        if name == 'PROTO' and value > pickle.HIGHEST_PROTOCOL:
            raise InputError('was written by a newer Python (protocol %d): load it there, save it with np.save' % value)
        if name in CONSTANTS:
            stack.append(CONSTANTS[name]())
        elif name in ('BINPUT', 'LONG_BINPUT', 'MEMOIZE'):
            memory[len(memory) if value is None else value] = stack[-1]
        elif name in ('BINGET', 'LONG_BINGET'):
            stack.append(memory[value])
        elif name == 'MARK':
            marks.append(len(stack))
        elif name in TAKE:    # so many values, or all since the last mark
            start = len(stack) - TAKE[name] if TAKE[name] else marks.pop()
            taken, stack[start:] = stack[start:], []
            if name.startswith('TUPLE'):
                stack.append(tuple(taken))
            elif name.startswith('APPEND'):
                stack[-1].extend(taken)
            else:
                stack[-1].update(_dict(zip(taken[::2], taken[1::2])))
        elif name in ('GLOBAL', 'STACK_GLOBAL'):
            full = value.replace(' ', '.') if value else '%s.%s' % (stack.pop(-2), stack.pop())
            full = full.replace('numpy._core', 'numpy.core')
            if full not in KNOWN:
                program = 'asks to run %s, which no checkpoint needs: do not use it' % full
                raise InputError(STRANGERS.get(full.split('.')[0], program))
            stack.append(KNOWN[full])
        elif name == 'REDUCE':    # call the function below its arguments
            stack[-2:] = [stack[-2](*stack[-1])]
        elif name == 'BUILD':     # give a dtype its byte order, an array its contents; of all else only items matter
            state = stack.pop()
            if isinstance(stack[-1], np.ndarray):
                array = _array(state[4], state[2], state[1], state[3], stack[-1])
                memory.update([(key, array) for key, kept in memory.items() if kept is stack[-1]])
                stack[-1] = array
            elif isinstance(stack[-1], list):
                stack[-1][0] = state[1]
        elif name == 'POP':
            stack.pop()
        elif name not in ('PROTO', 'FRAME', 'STOP'):
            if value is None:
                raise ValueError('%s is not expected' % name)
            stack.append(value)    # a number, a text, bytes
    return stack.pop()


def read_checkpoint(path):
    """What np.load(path, allow_pickle=True).item() gives if nothing but arrays, dicts, numbers and texts is in it."""
    try:
        with open(path, 'rb') as file:
            begin = file.peek(64).lstrip()
            for magic, text in ACCIDENTS.items():
                if begin.startswith(magic):
                    raise InputError(text)
            if not begin:
                raise InputError('is empty: fetch it again')
            try:
                version = np.lib.format.read_magic(file)
                dtype = getattr(np.lib.format, 'read_array_header_%d_%d' % version)(file)[2]
            except (AttributeError, ValueError, SyntaxError) as error:
                raise InputError('is no .npy file (%s): save a dict with np.save' % error)
            if dtype != object:
                raise InputError('holds an array of %s, not a dict of layers' % dtype)
            place, file = file.tell(), Mapped(file.fileno(), 0, access=mmap.ACCESS_COPY)
            file.seek(place)
            content = unpickle(file)
            return content[()] if isinstance(content, np.ndarray) else content
    except InputError as error:
        raise InputError('%s: %s' % (path, error))
    except OSError as error:
        raise InputError('%s: cannot be read (%s)' % (path, error.strerror))
    except Exception as error:    # whatever damaged bytes lead to
        raise InputError('%s: is cut short or damaged (%r): fetch it again' % (path, error))


def check(content, path):
    """The checkpoint {layer: {'weight', 'bias'}} in VGG16's order, C-ordered float32, out of what a file holds.

    Raises InputError, naming path and layer; says on standard error what it had to rename, convert or leave aside.
    """
    def listed(names):
        return ', '.join(names[:4]) + (' and %d more' % (len(names) - 4) if len(names) > 4 else '')

    if not isinstance(content, dict):
        raise InputError('%s: a dict of layers expected, got %s' % (path, type(content).__name__))
    wanted = {name + part: shape if part == '.weight' else shape[:1]
              for name, shape in SHAPES.items() for part in ('.weight', '.bias')}
    found, renamed, converted = {}, [], []
    inner = 'state_dict.' if isinstance(content.get('state_dict'), dict) else ''
    for key, value in (content['state_dict'] if inner else content).items():
        for part, array in value.items() if isinstance(value, dict) else [('', value)]:
            words = [text.decode('latin-1') if isinstance(text, bytes) else str(text) for text in (key, part)]
            full = '.'.join(words).rstrip('.')
            name = re.sub(r'^module\.', '', full)
            if name in found:
                raise InputError('%s: has %s twice' % (path, name))
            found[name] = array
            if name in wanted and (inner or key not in SHAPES):
                renamed.append('%s%s as the %s of %s' % (inner, full, *name.split('.')[::-1]))
    others = [name for name in found if name not in wanted]
    lacking = [name for name in wanted if name not in found]
    if lacking:
        raise InputError('%s: lacks %s%s' % (path, listed(lacking), '; it has ' + listed(others) if others else ''))
    if any(isinstance(found[name], np.ndarray) for name in others):
        raise InputError('%s: has unknown layers: %s' % (path, listed(others)))

    ckpt = {layer: {} for layer in SHAPES}
    for name, shape in wanted.items():
        array, (layer, part) = found[name], name.split('.')
        if not isinstance(array, np.ndarray):
            raise InputError('%s: %s: an array expected, got %s' % (path, name, type(array).__name__))
        if array.dtype.kind != 'f' or array.dtype.itemsize > 8:
            raise InputError('%s: %s: an array of %s, float32 is expected: save `array.astype(np.float32)`' % (
                path, name, array.dtype))
        if array.shape not in (shape, (1,) + shape):    # the latter: a bias that was a matrix
            raise InputError('%s: %s: shape %s expected, got %s' % (path, name, shape, array.shape))
        with np.errstate(over='ignore'):    # it is not finite then
            ckpt[layer][part] = np.ascontiguousarray(array.reshape(shape), dtype=np.float32)
        if not np.isfinite(ckpt[layer][part]).all():
            raise InputError('%s: %s: has numbers that are not finite in float32' % (path, name))
        if array.dtype != np.float32 or not array.flags.c_contiguous:
            converted.append(name)
    for text, names in ('read %s', renamed), ('left aside: %s', others), ('converted to plain float32: %s', converted):
        if names:
            print('%s: %s' % (path, text % listed(names)), file=sys.stderr)
    return ckpt


def load_checkpoint(path=None):
    """The network's parameters {layer: {'weight': ndarray, 'bias': ndarray}}, float32; or InputError.

    Parameters
    ----------
    path : str, optional
        An .npy file in the handbook's format.  Without it file/vgg16_ckpt.npy is read, and where only this package's
        file/vgg16_flowers.npz is there, made of that first; if it cannot be written, it is made in memory.
    """
    if path is None and not os.path.exists(CHECKPOINT) and os.path.exists(PACKED):
        from file.making import expand    # only here: the course's own file/ has no such folder
        print('file/vgg16_ckpt.npy is not there: making it of vgg16_flowers.npz, once', file=sys.stderr)
        try:
            expand.expand(PACKED, CHECKPOINT)
        except OSError as error:
            print('file/vgg16_ckpt.npy cannot be written (%s): going on without it' % error.strerror, file=sys.stderr)
            return expand.checkpoint(PACKED)
        except expand.PackedError as error:
            raise InputError(error)
    path = path or CHECKPOINT
    return check(read_checkpoint(path), path)


# ------------------------------------------------------------------------------------------------- the run

def not_made(error):
    """What an AttributeError of vgg.py says of a layer that __init__ has not made; or None."""
    name = re.search(r"'VGG16' object has no attribute '(\w+)'", str(error))
    place = traceback.extract_tb(error.__traceback__)[-1]
    return name and '%s is not made yet: %s line %d' % (name.group(1), os.path.basename(place.filename), place.lineno)


def misfit(model):
    """How vgg.py's network differs from VGG16 where a whole checkpoint did not load; or None."""
    layers = getattr(model, 'graph_layers', None) or {}
    for name, shape in SHAPES.items():
        if name not in layers:
            return 'vgg.py: graph_layers has no %s' % name
        if not hasattr(layers[name], 'load_params'):
            return 'vgg.py: %s is a %s, which has no weight' % (name, type(layers[name]).__name__)
        if layers[name].weight.shape != shape:
            return 'vgg.py: %s: its weight has shape %s, that of VGG16 %s' % (name, layers[name].weight.shape, shape)
    return None


def class_number(text):
    """The number of a class given by name or number.

    Examples
    --------
    >>> class_number('roses'), class_number('3')
    (1, 3)
    """
    if text in CLASSES:
        return CLASSES.index(text)
    if text in [str(number) for number in range(len(CLASSES))]:
        return int(text)
    raise argparse.ArgumentTypeError('%r is no class: give a number from 0 to %d or one of %s' % (
        text, len(CLASSES) - 1, ', '.join(CLASSES)))


def arguments_of(argv):
    parser = argparse.ArgumentParser(description='Classify a flower picture with VGG16 and propagate back to it.')
    parser.add_argument('image', nargs='?', default=IMAGE, help='a picture file (default: the tulips of file/)')
    parser.add_argument('--ckpt', metavar='PATH', help='a checkpoint in the format of the handbook '
                        '(default: file/vgg16_ckpt.npy, made of file/vgg16_flowers.npz where it is not there)')
    parser.add_argument('--label', type=class_number, default=1, metavar='NAME_OR_NUMBER',
                        help='the class that the loss is computed against: 0 to 3 or %s (default: 1, roses, as in '
                             'the handbook)' % ', '.join(CLASSES))
    parser.add_argument('--picture', metavar='OUT.png', help='after the run, draw what the network saw into this file')
    parser.add_argument('--overwrite', action='store_true', help='let --picture replace a file that is there')
    return parser.parse_args(argv)


def run(arguments):
    # What is wrong with the files is said before anything is printed.
    image = read_image(arguments.image)
    if arguments.picture:
        sys.path.append(os.path.join(HERE, 'tests'))
        try:
            import picture    # only now: a run without it starts sooner
            picture.check_path(arguments.picture, arguments.overwrite, (arguments.image, arguments.ckpt))
        except ImportError:
            raise InputError('--picture needs tests/picture.py, which is not there')
        except ValueError as error:
            raise InputError(error)
    try:
        model = VGG16(4)
    except AttributeError as error:
        if not_made(error):
            raise InputError(not_made(error))
        raise
    ckpt = load_checkpoint(arguments.ckpt)
    try:
        model.resume_weights(ckpt)
    except (AssertionError, AttributeError, KeyError, TypeError):
        if misfit(model):    # the checkpoint is VGG16's
            raise InputError(misfit(model))
        raise

    start_time = time.time()

    tensor = process_image(image)

    outputs = model.forward(tensor)
    print(outputs)
    pred = int(np.argmax(outputs))
    print(CLASSES[pred])

    label = np.array([arguments.label, ])
    loss_func = CrossEntropy()
    loss = loss_func.forward(outputs, label)
    print(loss)

    grad = loss_func.backward()
    grad = model.backward(grad)
    print(grad.mean(), grad.sum())

    end_time = time.time()
    print(end_time - start_time)

    if arguments.picture:
        try:
            picture.write(arguments.picture, picture.draw(image, tensor, model, CLASSES), arguments.overwrite)
        except (OSError, ValueError) as error:
            raise InputError('%s cannot be written: %s' % (arguments.picture, error))


def main(argv=None):
    """Run the script; return its exit status."""
    if sys.stdout is None:
        print('main.py: standard output is closed: there is nowhere to print to', file=sys.stderr)
        return 1
    try:
        run(arguments_of(argv))
        sys.stdout.flush()
        return 0
    except InputError as error:
        print('main.py: %s' % error, file=sys.stderr)
        return 1
    except MemoryError:
        print('main.py: not enough memory: the network alone takes 0.6 GB', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('main.py: interrupted', file=sys.stderr)
        return 130
    except OSError as error:
        if error.filename is not None:    # no print
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())    # for what is still to be written
        if isinstance(error, BrokenPipeError):    # `main.py | head -1`: nobody reads on
            return 0
        print('main.py: no room for standard output or, where numba keeps them, for the compiled loops (%s): free some, or '
              'set NUMBA_CACHE_DIR to another folder' % error.strerror, file=sys.stderr)
        return 1


if __name__ == '__main__':
    sys.exit(main())
