"""The lab's script: classify a picture with VGG16, compute the loss against a label, propagate back to the picture.

Standard output is the lab's transcript and nothing else; hints and errors go to standard error.
"""
import argparse
import gc
import os
import signal
import sys
import time


def stop(*_):
    """What Ctrl-C does while the imports below run; later it raises KeyboardInterrupt, which main catches."""
    os.write(2, b'main.py: interrupted\n')
    os._exit(130)


if __name__ == '__main__':
    signal.signal(signal.SIGINT, stop)
    # Imports and numba's compiler make very many objects that stay: looking through all of them for cycles, again
    # and again, took a twentieth of a first run.
    gc.set_threshold(20000, 20, 1000)

# OpenCV itself stops at a thousand million pixels, which would take 3 GB; a hundred million are enough for a flower.
os.environ.setdefault('OPENCV_IO_MAX_IMAGE_PIXELS', str(100 * 1000 * 1000))
import cv2                      # noqa: E402
import numpy as np              # noqa: E402

from file import ahead, checkpoint, memory, once    # noqa: E402
from loss import CrossEntropy   # noqa: E402
from vgg import VGG16           # noqa: E402

CLASSES = ('daisy', 'roses', 'sunflowers', 'tulips')
IMAGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'file', 'tulips_demo.jpg')


class PictureError(Exception):
    """A picture that cannot be read or written; the text says which file, what is wrong and what to do."""


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
    """The picture in a file.

    The file is read as bytes and then decoded: cv2.imread cannot open every path on every system.

    Parameters
    ----------
    img_path : str

    Returns
    -------
    ndarray (H, W, 3), uint8, RGB

    Raises
    ------
    PictureError
        For a file that cannot be read or is no picture.
    """
    try:
        with open(img_path, 'rb') as file:
            content = np.frombuffer(file.read(), dtype=np.uint8)
    except OSError as error:
        raise PictureError('%s: cannot be read (%s): give the path of a JPEG or PNG file' % (img_path, error.strerror))
    try:
        image = cv2.imdecode(content, cv2.IMREAD_COLOR)
    except cv2.error:    # larger than OpenCV's own limits
        image = None
    if image is None:
        raise PictureError('%s: is no picture that OpenCV can read, or a damaged or enormous one: '
                           'save it as JPEG or PNG and try again' % img_path)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def to_tensor(image):
    """The network's input made of a picture, handbook 2.5.1.

    Parameters
    ----------
    image : ndarray (H, W, 3), uint8, RGB

    Returns
    -------
    ndarray (1, 3, 224, 224), float32
        (image - mean) / std of each channel.
    """
    image = resize_image(image, (224, 224))
    image = np.array(image, dtype=np.float32)
    image -= [125.307, 122.961, 113.8575]
    image /= [51.5865, 50.847, 51.255]
    return image.transpose((2, 0, 1))[None]


def process_image(img_path):
    """The network's input made of a picture file, handbook 2.5.1.

    Parameters
    ----------
    img_path : str

    Returns
    -------
    ndarray (1, 3, 224, 224), float32

    Raises
    ------
    PictureError
        For a file that cannot be read or is no picture.
    """
    return to_tensor(read_image(img_path))


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
    return parser.parse_args(argv)


def run(arguments):
    model = VGG16(4)
    shapes = {name: layer.weight_shape for name, layer in model.graph_layers.items() if hasattr(layer, 'weight_shape')}
    image = read_image(arguments.image)    # what is wrong with the files is said before anything is computed
    if arguments.picture:
        from file import picture    # only now: a run without it starts sooner
        try:
            picture.check_path(arguments.picture)
        except ValueError as error:
            raise PictureError(error)
    with ahead.late_loops() as wait_for_late_loops:
        model.resume_weights(checkpoint.load(arguments.ckpt, shapes, ahead.compile_first_loops))

        start_time = time.time()
        tensor = process_image(arguments.image)

        outputs = model.forward(tensor)
        print(outputs)
        pred = int(np.argmax(outputs))
        print(CLASSES[pred])

        label = np.array([arguments.label, ])
        loss_func = CrossEntropy()
        loss = loss_func.forward(outputs, label)
        print(loss)

        grad = loss_func.backward()
        wait_for_late_loops()
        grad = model.backward(grad)
        print(grad.mean(), grad.sum())

        end_time = time.time()
        print(end_time - start_time)

    if arguments.picture:
        try:
            picture.write(arguments.picture, picture.draw(image, tensor, model, CLASSES))
        except OSError as error:
            raise PictureError('%s: cannot be written (%s)' % (arguments.picture, error.strerror))


def main(argv=None):
    """Run the script; return its exit status."""
    try:
        run(arguments_of(argv))
        sys.stdout.flush()
        return 0
    except (PictureError, checkpoint.CheckpointError) as error:
        print('main.py: %s' % error, file=sys.stderr)
        return 1
    except MemoryError:
        print('main.py: not enough memory: the network alone takes 0.6 GB', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('main.py: interrupted', file=sys.stderr)
        return 130
    except BrokenPipeError:    # `main.py | head -1`: nobody reads on, so there is nothing left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.default_int_handler)
    memory.keep_what_is_freed()
    once.compile_once()
    status = main()
    gc.freeze()    # Python would look for cycles once more in the end, although all goes with the process
    sys.exit(status)
