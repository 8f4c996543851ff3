"""Judging one submission: what is right, the student's process, and what comes out of it.

Nothing of a submission is imported here.  Its process (grade_worker.py) is asked to make the network, to run a layer,
and so on, and answers with numbers, which are compared with this package's own.  A reply that is late, malformed, too
large or missing is a wrong answer of that layer; the rest is examined in a new process.
"""
import os
import shutil
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np

import mistakes
from compare import TOLERANCE
from grade_process import Gone, line_of

TOLERANCE_OF_ONE = 1e-4    # of the largest number, where TOLERANCE is of the sum of magnitudes
NEARLY = 2e-5              # numbers that differ by less, of the largest, may be equal to another correct program
DIRECTIONS = ('forward', 'backward')
LOCK = threading.Lock()    # not all of numba's threads can be started by two of this process at once


# --------------------------------------------------------------------------------------------- comparing arrays

def small(off, expected, direction):
    """Whether differences are no more than rounding can explain."""
    magnitudes = np.abs(expected)
    return (off.sum(dtype=np.float64) <= TOLERANCE[direction, True] * magnitudes.sum(dtype=np.float64)
            and off.max() <= TOLERANCE_OF_ONE * magnitudes.max())


def settled(kind, off, inputs):
    """The differences of a gradient, less those that stem from a tie decided otherwise.

    Where two numbers of a pooling window are equal but for rounding, either may be the maximum: only the sum of their
    gradients is laid down.  Where the input of a ReLU is zero but for rounding, its gradient may pass or not.
    """
    near = NEARLY * np.abs(inputs).max()
    if kind == 'ReluLayer':
        return np.where(np.abs(inputs) <= near, 0, off)
    if kind == 'MaxPoolLayer':
        n, c, h, w = inputs.shape
        windows, off = (array.reshape(n, c, h // 2, 2, w // 2, 2) for array in (inputs, off))
        tied = windows >= windows.max(axis=(3, 5), keepdims=True) - near
        count = tied.sum(axis=(3, 5), keepdims=True)
        shared = np.where(tied, off, 0).sum(axis=(3, 5), keepdims=True) / count
        return np.where(tied & (count > 1), shared, off)
    return off


def compared(direction, kind, actual, expected, inputs=None):
    """What is wrong with a layer's result, or None, and whether it is right only by a tie that went another way.

    inputs, for a gradient, are those of the layer.
    """
    if actual.shape != expected.shape:
        return 'shape %s, should be %s' % (actual.shape, expected.shape), False
    actual = actual.astype(np.result_type(actual, np.float32), copy=False)
    with np.errstate(all='ignore'):
        off = np.abs(actual - expected)
        if small(off, expected, direction):
            return None, False
        finite = np.isfinite(actual)
        if not finite.all():
            return '%d of its numbers are not finite, the first at %s' % (
                (~finite).sum(), mistakes.place(np.argmin(finite), actual.shape)), False
        if inputs is not None:
            off = np.abs(settled(kind, actual - expected, inputs)).reshape(actual.shape)
            if small(off, expected, direction):
                return None, True
        worst, wrong = off.argmax(), off > TOLERANCE_OF_ONE * np.abs(expected).max()
        return '%s; at %s expected %.6g, found %.6g' % (
            mistakes.seen(actual, expected, wrong, off), mistakes.place(worst, off.shape), expected.reshape(-1)[worst],
            actual.reshape(-1)[worst]), False


# ------------------------------------------------------------------------------------------------ what is right

class Picture(object):
    """A picture, its class, and what every layer makes of it: forward, and back from the loss against `label`."""

    def __init__(self, title, file, tensor, best):
        self.title, self.file, self.tensor, self.best = title, file, tensor, best
        self.results, self.given = {}, {}    # {(direction, layer): array}

    def run(self, layers, loss):
        x = self.tensor
        for name, layer in layers.items():
            self.given['forward', name] = x
            x = self.results['forward', name] = layer.forward(x)
        self.logits = x
        self.label = np.array([1 if self.best != 1 else 0])    # as in the handbook, unless its gradient vanishes
        self.loss = float(loss.forward(x, self.label))
        grad = self.loss_gradient = loss.backward()
        for name, layer in reversed(list(layers.items())):
            self.given['backward', name] = grad
            grad = self.results['backward', name] = np.ascontiguousarray(layer.backward(grad))


def another(image, rng):
    """A picture made of one that everybody knows: mirrored or not, cropped, its colours shifted."""
    height, width = (int(length * rng.uniform(0.75, 0.95)) for length in image.shape[:2])
    top, left = (rng.randint(whole - length + 1) for whole, length in zip(image.shape, (height, width)))
    image = image[top:top + height, left:left + width].astype(np.float64)
    if rng.randint(2):
        image = image[:, ::-1]
    image = image * rng.uniform(0.9, 1.1, 3) + rng.uniform(-12, 12, 3) + rng.uniform(-3, 3, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


class Reference(object):
    """This package's own results, and `given`, a folder with what is no secret: the checkpoint and the pictures.

    Attributes
    ----------
    kinds : {layer: name of its class}
    shown : list of Picture
        What process_image is tried on.
    pictures : list of Picture
        What goes through the network: one that is made up of a seed, or those that are shown.
    """

    def __init__(self, package, folder, paths, seed, ckpt):
        sys.path.insert(0, package)
        from loss import CrossEntropy
        from main import load_checkpoint, process_image
        from vgg import VGG16
        self.given = os.path.join(folder, 'given')
        os.mkdir(self.given)
        self.layers = VGG16().graph_layers
        self.kinds = {name: type(layer).__name__ for name, layer in self.layers.items()}
        self.parameters = load_checkpoint(ckpt)
        self.files = {name: {key: '%s.%s.npy' % (name, key) for key in ('weight', 'bias')} for name in self.parameters}
        for name, params in self.parameters.items():
            self.layers[name].load_params(params['weight'], params['bias'])
            for key, file in self.files[name].items():
                np.save(os.path.join(self.given, file), np.asarray(params[key], np.float32))

        self.shown = []
        for path in paths:
            tensor, file = process_image(path), '%d%s' % (len(self.shown), os.path.splitext(path)[1])
            shutil.copyfile(path, os.path.join(self.given, file))
            self.shown.append(Picture(os.path.basename(path), file, tensor, self.classify(tensor)))
        self.pictures = self.shown
        if seed is not None:
            self.pictures = [self.made_up(paths[0], os.path.join(folder, 'made_up.png'), process_image, seed)]
        for picture in self.pictures:
            picture.run(self.layers, CrossEntropy())

    def classify(self, tensor):
        for layer in self.layers.values():
            tensor = layer.forward(tensor)
        return int(np.argmax(tensor))

    def made_up(self, path, file, process_image, seed):
        """A picture that nobody has seen, of the class of the one that it is made of."""
        import cv2
        rng = np.random.RandomState(seed)
        for _ in range(20):
            cv2.imwrite(file, another(cv2.imread(path), rng))
            tensor = process_image(file)
            best = self.classify(tensor)
            if best == self.shown[0].best:
                break
        return Picture('picture of seed %d' % seed, None, tensor, best)


# -------------------------------------------------------------------------------------------- one submission

class Wrong(Exception):
    """What is wrong with a network; the text says it."""


class OutOfTime(Exception):
    """All the time of a submission is used up."""


class Examination(object):
    """Of one submission; start() starts a process, with keywords set in its environment."""

    def __init__(self, reference, start, seconds):
        self.reference, self.start, self.seconds = reference, start, seconds
        self.end, self.patience = time.monotonic() + seconds, seconds / 4
        self.process, self.names, self.rng = None, list(reference.kinds), np.random.RandomState()
        self.forwarded = set()    # layers that this process has run forward on the right inputs
        self.fatal = set()        # layers whose forward ends the process
        self.computed = set()     # (direction, layer) whose numbers are wrong
        self.has = []             # what main.py, layer.py and loss.py define beside the layers
        self.built = 'not reached'    # why the network is not what it should be; None if it is
        self.wrong = {direction: {} for direction in DIRECTIONS}    # {layer: why}, the first one first
        self.mistakes = {}        # {(direction, layer): what explains its numbers}
        self.passed = {}          # {(direction, index of picture): whether the network as a whole was right}
        self.notes = []

    # -------------------------------------------------------------------------------------------- the process

    def request(self, *arrays, **header):
        """Send a request, or none, and return the reply's header and arrays."""
        left = self.end - time.monotonic()
        if left <= 0:
            raise OutOfTime
        try:
            return self.process.ask(min(left, self.patience), *arrays, **header)
        except Gone:
            self.close()
            raise

    def close(self):
        if self.process:
            self.process.end()
        self.process = None
        self.forwarded.clear()

    def fresh(self, **environment):
        """Start a process, with a network that has the checkpoint; return what layers it has, and what went wrong."""
        self.close()
        self.process = self.start(**environment)
        header, _ = self.request(do='make')
        layers = [line_of(layer).split() for layer in header.get('layers', [])]
        if [layer[0] for layer in layers] == self.names:
            header, _ = self.request(do='load', parameters=self.reference.files)
        return layers, header.get('error')

    def ask(self, *arrays, **header):
        """What is wrong with a reply, or None; its header, and its arrays."""
        try:
            if not self.process:
                self.fresh()
            header, arrays = self.request(*arrays, **header)
        except Gone as gone:
            return str(gone), {}, []
        return line_of(header['error']) if 'error' in header else None if arrays else 'returns nothing', header, arrays

    # -------------------------------------------------------------------------------------------- the network

    def network(self):
        """Make the network, and look whether it is the right one; Wrong says what it lacks."""
        layers, error = self.fresh()
        if error and not layers:
            raise Wrong(line_of(error))
        for place, (name, kind) in enumerate(self.reference.kinds.items()):
            found = layers[place] if place < len(layers) else ['missing']
            if found[0] != name:
                raise Wrong('layer %d of graph_layers should be %s, is %s' % (place + 1, name, found[0]))
            if kind not in found:
                raise Wrong('%s should be a %s, is a %s' % (name, kind, found[1]))
        if len(layers) > len(self.names):
            raise Wrong('graph_layers has %d layers, should have %d' % (len(layers), len(self.names)))
        if error:
            raise Wrong(line_of(error))
        for name, params in self.reference.parameters.items():
            for key, array in params.items():
                places = self.rng.randint(0, array.size, 500)
                _, held = self.request(places, do='held', layer=name, key=key, shape=array.shape)
                wanted = np.asarray(array, np.float32).reshape(-1)[places]
                if not any(np.array_equal(numbers, wanted) for numbers in held):
                    raise Wrong('%s does not hold the checkpoint\'s %s after resume_weights' % (name, key))

    def judge(self, direction, name, picture, why, arrays):
        """Whether a layer's reply is right, and what the layers after it get in its place."""
        tied, expected = False, picture.results[direction, name]
        if not why:
            inputs = picture.given['forward', name] if direction == 'backward' else None
            why, tied = compared(direction, self.reference.kinds[name], arrays[0], expected, inputs)
            if why:
                self.computed.add((direction, name))
        if why:
            self.wrong[direction].setdefault(name, why)
        return not why, [expected.astype(arrays[0].dtype)] if tied else []

    def one_pass(self, direction, picture, given):
        """Through the network's own method, in which every layer gets what the one before it made.

        Returns
        -------
        tuple
            The layers that were seen, and what came out, or None if not all was right.
        """
        seen, method = set(), 'VGG16.' + direction
        current = method
        why, header, arrays = self.ask(given, do='one_pass', direction=direction)
        for _ in range(4 * len(self.names)):
            if header.get('enter') in self.reference.kinds:
                current = header['enter']
                why, header, arrays = self.ask()
            elif header.get('layer') in self.reference.kinds:
                name, current = header['layer'], method
                seen.add(name)
                self.forwarded.add(name)
                right, instead = self.judge(direction, name, picture, why, arrays)
                why, header, arrays = self.ask(*instead, do='go on' if right else 'stop')
            else:
                break
        if not self.process:    # it is gone
            seen.add(current)
            if direction == 'forward':
                self.fatal.add(current)
            self.wrong[direction].setdefault(current, why)
        elif not self.wrong[direction]:
            last = picture.results[direction, self.names[-1 if direction == 'forward' else 0]]
            why = why or compared(direction, '', arrays[0], last)[0]
            if why:
                self.wrong[direction][method] = why
        return seen, None if self.wrong[direction] else arrays[0]

    def alone(self, direction, name, picture):
        """A layer by itself, on the right inputs."""
        if direction == 'backward' and name not in self.forwarded:
            why = self.wrong['forward'].get(name) if name in self.fatal else self.alone('forward', name, picture)[0]
            if name in self.fatal:
                return 'its forward %s' % why, {}, []
        reply = self.ask(picture.given[direction, name], do='layer', direction=direction, layer=name)
        if direction == 'forward':
            (self.forwarded if self.process else self.fatal).add(name)
        return reply

    def run(self, index, direction, given):
        """One pass, and then the layers that it did not reach; return what came out, or None if not all was right."""
        picture, seen, result = self.reference.pictures[index], set(), None
        if given is not None:
            seen, result = self.one_pass(direction, picture, given)
        for name in self.names if direction == 'forward' else reversed(self.names):
            if name not in seen:
                why, _, arrays = self.alone(direction, name, picture)
                if not self.judge(direction, name, picture, why, arrays)[0]:
                    result = None
        self.passed[direction, index] = result is not None
        return result

    def classified(self, shown):
        """Whether process_image makes of a picture file what it should, or something that is classified alike."""
        why, _, arrays = self.ask(do='process_image', picture=shown.file)
        alike = bool(arrays) and arrays[0].shape == shown.tensor.shape
        why = why or compared('forward', '', arrays[0], shown.tensor)[0]
        if why:
            self.notes.append('main.py: process_image of %s: %s' % (shown.title, why))
            with LOCK:
                return alike and self.reference.classify(arrays[0].astype(np.float32)) == shown.best
        return True

    def loss_gradient(self, picture, logits):
        """The submission's gradient of its logits; None if it is wrong, this package's own if there is none."""
        if 'CrossEntropy' not in self.has:
            self.notes.append('no CrossEntropy in main.py, layer.py or loss.py: the loss is taken as right')
            return picture.loss_gradient
        why, header, arrays = self.ask(logits, picture.label, do='cross_entropy')
        if not abs(header.get('loss', picture.loss) - picture.loss) <= TOLERANCE_OF_ONE * max(1, picture.loss):
            self.notes.append('CrossEntropy: the loss is %.6g, should be %.6g' % (header['loss'], picture.loss))
        why = why or compared('backward', '', arrays[0], picture.loss_gradient)[0]
        if why:
            self.wrong['backward']['CrossEntropy'] = why
        return None if why else arrays[0]

    # ------------------------------------------------------------------------------------ what the mistake is

    def diagnose(self):
        """Name what explains the first wrong layer of each kind, in either direction."""
        for direction in DIRECTIONS:
            known = set()
            for name, why in self.wrong[direction].items():
                kind = self.reference.kinds.get(name, name)
                if kind not in known:
                    known.add(kind)
                    words = None
                    if (direction, name) in self.computed:
                        words = self.small_mistake(direction, name, kind)
                    if not words and kind in ('ConvolutionLayer', 'MaxPoolLayer') and (
                            ' by SIG' in why or (direction, name) in self.computed):
                        words = self.past_an_array(direction, name, kind)
                    if kind == 'CrossEntropy':
                        picture = self.reference.pictures[0]
                        c = SimpleNamespace(kind=kind, x=picture.logits, labels=picture.label)
                        _, _, arrays = self.ask(c.x, c.labels, do='cross_entropy')
                        words = arrays and mistakes.explain(c, direction, arrays[0])
                    if words:
                        self.mistakes[direction, name] = words

    def small_mistake(self, direction, name, kind):
        """What explains the numbers of a layer, on planes of 6 x 6 with its own parameters; None if nothing does."""
        layer, picture = self.reference.layers[name], self.reference.pictures[0]
        arguments, shape = (), (1, 3, 6, 6)
        if kind == 'ConvolutionLayer':
            arguments = layer.in_channels, layer.out_channels, layer.kernel_size, layer.padding, layer.stride
            shape = 1, layer.in_channels, 6, 6
        elif kind == 'MaxPoolLayer':
            arguments = layer.kernel_size, layer.stride
        elif kind == 'FullyConnectLayer':
            shape = 1, layer.in_features
        c = mistakes.case(kind, arguments, shape, self.rng, **self.reference.parameters.get(name, {}))
        if kind == 'MaxPoolLayer':
            c.x = abs(c.x)    # as after a ReLU
        self.forwarded.discard(name)
        for way, given in (('forward', c.x), ('backward', c.g))[:1 + (direction == 'backward')]:
            why, _, arrays = self.ask(given, do='layer', direction=way, layer=name)
        if why:
            return None
        if direction == 'backward' and mistakes.near(arrays[0], mistakes.right(c, direction), mistakes.SAME):
            why, _, arrays = self.alone(direction, name, picture)
            if not why and not compared(direction, kind, arrays[0], picture.results[direction, name],
                                        picture.given['forward', name])[0]:
                return 'is right when it runs alone: in the network, what it keeps of forward is overwritten'
            return None
        return mistakes.explain(c, direction, arrays[0])

    def past_an_array(self, direction, name, kind):
        """What plain Python says of a tiny layer, with the line, or numba's bounds check of the one that went wrong."""
        tiny = next(tiny for tiny in mistakes.TINY if tiny[0] == kind)
        for environment in ({'NUMBA_DISABLE_JIT': '1'}, {'NUMBA_BOUNDSCHECK': '1'}):
            try:
                self.fresh(**environment)
            except Gone:
                return None
            if 'NUMBA_BOUNDSCHECK' in environment:
                why, _, _ = self.alone(direction, name, self.reference.pictures[0])
            else:
                why, _, _ = self.new_layer(mistakes.case(*tiny + (self.rng,)), tiny[1])
            self.close()
            if 'IndexError' in str(why):
                return 'reads or writes past an array: ' + why
        return None

    def new_layer(self, c, arguments):
        name = next(name for name, kind in self.reference.kinds.items() if kind == c.kind)
        parameters = [] if c.weight is None else [c.weight, c.bias]
        return self.ask(c.x, c.g, *parameters, do='new_layer', layer=name, arguments=arguments)

    def beyond(self):
        """What the rubric does not ask for; notes on it, which count for nothing."""
        wrong = {self.reference.kinds.get(name, name) for direction in DIRECTIONS for name in self.wrong[direction]}
        for kind, arguments, shape in mistakes.TINY + [('MaxPoolLayer', (2, 2), (2, 3, 6, 6))]:
            if kind not in wrong:
                c = mistakes.case(kind, arguments, shape, self.rng)
                if shape == (2, 3, 6, 6):
                    c.x = np.round(c.x)    # ties
                why, _, arrays = self.new_layer(c, arguments)
                self.note_beyond('%s(%s)' % (kind, ', '.join(map(str, arguments))), c, arrays, why)
        for near in (0, 1000) if 'CrossEntropy' in self.has and 'CrossEntropy' not in wrong else ():
            c = SimpleNamespace(kind='CrossEntropy', x=near + self.rng.randn(2, 4), labels=self.rng.randint(0, 4, 2))
            why, header, arrays = self.ask(c.x, c.labels, do='cross_entropy')
            self.note_beyond('CrossEntropy of logits near %d' % near, c,
                             [np.array(header['loss'])] * ('loss' in header) + arrays, why)

    def note_beyond(self, title, c, arrays, why):
        for direction, found in zip(DIRECTIONS, arrays):
            expected = mistakes.right(c, direction)
            if not mistakes.near(found, expected, mistakes.SAME):
                why = mistakes.explain(c, direction, found) or (
                    'is wrong' if found.shape == expected.shape else
                    'shape %s, should be %s' % (found.shape, expected.shape))
                break
        if why:
            self.notes.append('beyond the rubric: %s on %s numbers: %s' % (
                title, ' x '.join(map(str, c.x.shape)), why if not arrays else '%s: %s' % (direction, why)))

    # ---------------------------------------------------------------------------------------------------- all

    def examine(self):
        try:
            self.network()
            self.built, reference = None, self.reference
            why, found, _ = self.ask(do='look')
            self.has, self.notes = found.get('has', []), list(map(line_of, found.get('notes', ['main.py: %s' % why])))
            shown = 'process_image' not in self.has or all([self.classified(shown) for shown in reference.shown])
            for index, picture in enumerate(reference.pictures):
                logits, grad = None, None
                if self.passed.get(('forward', index - 1), True):
                    logits = self.run(index, 'forward', picture.tensor)
                    self.passed['forward', index] &= shown
                if self.passed.get(('backward', index - 1), True):
                    if logits is not None:
                        grad = self.loss_gradient(picture, logits)
                    self.run(index, 'backward', grad)
            self.diagnose()
            self.beyond()
        except (Wrong, Gone) as error:
            self.built = str(error)
        except OutOfTime:
            self.notes.append('not all was examined: the time limit of %g s' % self.seconds)
        finally:
            self.close()
