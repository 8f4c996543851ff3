"""Examine one submission, in a process of its own.

    python tests/grade_worker.py EXPECTED SUBMISSION EVENTS GIGABYTES

Started by grade.py.  EXPECTED is what grade_expect.py wrote, SUBMISSION a copy of a student's folder.  Everything that
is found out goes at once, as a line of JSON, to the file EVENTS: the code examined here may crash or never return.

Nothing but the standard library and numpy is imported, so that a submission finds only its own modules.  This is no
prison: it keeps mistakes from doing harm, not an attacker.
"""
import ast
import copy
import json
import os
import sys
import traceback
import types

import numpy as np

# Measured with plain loops and with float64 in place of layer.py's float32: 1.3e-6 of the sum of magnitudes and
# 2.5e-6 of the largest number, wherever no tie is decided otherwise (see settled).  A convolution of the shipped
# network without its bias is off by 6e-5 and more.
TOLERANCE = 2e-5
TOLERANCE_OF_ONE = 1e-4
NEARLY = 2e-5    # numbers that differ by less, relative to the largest, may be equal to another correct program
LONGEST = 300    # characters of an error message; numba's fill pages


class Wrong(Exception):
    """Ends a pass through the network at its first wrong layer."""


def limit(gigabytes):
    """Bound memory and file sizes, where the system can."""
    try:
        import resource
        for kind, most in ((resource.RLIMIT_AS, int(float(gigabytes) * 2**30)), (resource.RLIMIT_FSIZE, 2**28),
                           (resource.RLIMIT_CORE, 0)):
            resource.setrlimit(kind, (most, most))
    except (ImportError, ValueError, OSError):
        pass


def account(error):
    """An exception in one line: where in the submission, which, what."""
    here = os.getcwd() + os.sep
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        frames.append((error.filename, error.lineno))
    mine = [(filename[len(here):], line) for filename, line in frames if filename and filename.startswith(here)]
    place = '%s line %s: ' % mine[-1] if mine else ''
    text = ' '.join((error.msg if isinstance(error, SyntaxError) else str(error)).split())
    return (place + type(error).__name__ + (': ' + text if text else ''))[:LONGEST]


def settled(name, off, inputs):
    """The differences of a gradient, less those that stem from a tie decided otherwise.

    Where two numbers of a pooling window are equal but for rounding, either may be the maximum: only the sum of their
    gradients is laid down.  Where the input of a ReLU is zero but for rounding, its gradient may pass or not.
    """
    near = NEARLY * np.abs(inputs).max()
    if 'relu' in name:
        return np.where(np.abs(inputs) <= near, 0, off)
    if 'maxpool' in name:
        n, c, h, w = inputs.shape
        windows, off = (array.reshape(n, c, h // 2, 2, w // 2, 2) for array in (inputs, off))
        tied = windows >= windows.max(axis=(3, 5), keepdims=True) - near
        count = tied.sum(axis=(3, 5), keepdims=True)
        shared = np.where(tied, off, 0).sum(axis=(3, 5), keepdims=True) / count
        return np.where(tied & (count > 1), shared, off)
    return off


def judge(name, actual, expected, inputs=None):
    """What is wrong with a result, or None; inputs, for a gradient, is a function that returns the layer's inputs."""
    if not isinstance(actual, np.ndarray):
        return 'returns %s, not an array' % type(actual).__name__
    if actual.shape != expected.shape:
        return 'shape %s, should be %s' % (actual.shape, expected.shape)
    magnitudes = np.abs(expected)
    size, largest = magnitudes.sum(dtype=np.float64), magnitudes.max()

    def small(off):
        return off.sum(dtype=np.float64) <= TOLERANCE * size and off.max() <= TOLERANCE_OF_ONE * largest

    with np.errstate(all='ignore'):
        off = np.abs(actual - expected)
        if small(off):
            return None
    if not np.isfinite(actual).all():
        return 'has numbers that are not finite'
    if inputs is not None:
        off = np.abs(settled(name, actual - expected, inputs())).reshape(actual.shape)
        if small(off):
            return None
    error, worst = off.sum(dtype=np.float64), off.max()
    if not actual.any():
        return 'all zeros'
    if error <= TOLERANCE * size:
        return 'some numbers off, by up to %.2g of the largest, at %s' % (worst / largest, tuple(
            int(index) for index in np.unravel_index(off.argmax(), actual.shape)))
    ratio = np.vdot(actual, expected) / max(np.vdot(expected, expected), np.finfo(np.float64).tiny)
    if abs(ratio - 1) > 1e-3 and np.abs(actual - ratio * expected).sum() <= 1e-3 * abs(ratio) * size:
        return '%.4g times what it should be' % ratio
    return 'off by %.2g of its sum of magnitudes' % (error / size if size else np.inf)


def definitions(path):
    """What a main.py defines: its imports, functions, classes and constants, without running its script."""
    with open(path, 'rb') as file:
        tree = ast.parse(file.read(), path)
    defining = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    tree.body = [node for node in tree.body if isinstance(node, defining) or isinstance(node, ast.Assign) and all(
        isinstance(call.func, ast.Attribute) and call.func.attr == 'array'
        for call in ast.walk(node.value) if isinstance(call, ast.Call))]
    module = types.ModuleType('submitted_main')
    module.__file__ = path
    exec(compile(tree, path, 'exec'), module.__dict__)
    return module


class Picture(object):
    """The expected results for one picture; every array is a fresh copy, which a layer may overwrite."""

    def __init__(self, folder, index, facts, names):
        self.folder, self.index, self.facts, self.names = os.path.join(folder, str(index)), index, facts, names

    def array(self, name, dtype=np.float32):
        return np.load(os.path.join(self.folder, name + '.npy')).astype(dtype, copy=False)

    def result(self, direction, name):
        return self.array('%s-%s' % (direction, name))

    def given(self, direction, name):
        """What a layer is given: the inputs, or the gradient of its output, in the dtype of the package's run."""
        place = self.names.index(name)
        if direction == 'forward':
            return self.result('forward', self.names[place - 1]) if place else self.array('tensor')
        after = self.names[place + 1] if place + 1 < len(self.names) else 'loss'
        return self.array('backward-' + after, self.facts['dtypes'][name])


class Probe(object):
    """Stands for a layer in the submission's graph, and judges what comes out of it."""

    def __init__(self, examine, name):
        self.examine, self.name = examine, name

    def forward(self, inputs):
        return self.examine('forward', self.name, inputs)

    def backward(self, out_grad):
        return self.examine('backward', self.name, out_grad)


class Examination(object):
    """Of one submission, from import to input gradient."""

    def __init__(self, expected, events):
        self.expected, self.events = expected, events
        with open(os.path.join(expected, 'expected.json')) as file:
            self.facts = json.load(file)
        self.names = [name for name, _ in self.facts['layers']]

    def say(self, **facts):
        self.events.write(json.dumps(facts) + '\n')
        self.events.flush()

    def network(self):
        """A new network of the submission with the checkpoint loaded; Wrong says what it lacks."""
        from vgg import VGG16
        network = VGG16()
        layers = network.graph_layers
        for place, (name, kind) in enumerate(self.facts['layers']):
            if place >= len(layers) or list(layers)[place] != name:
                raise Wrong('layer %d of graph_layers should be %s, is %s' % (
                    place + 1, name, (list(layers) + ['missing'] * 37)[place]))
            if kind not in [base.__name__ for base in type(layers[name]).__mro__]:
                raise Wrong('%s should be a %s, is a %s' % (name, kind, type(layers[name]).__name__))
        if len(layers) > len(self.names):
            raise Wrong('graph_layers has %d layers, should have %d' % (len(layers), len(self.names)))
        parameters = {name: {key: np.asarray(np.load(os.path.join(self.expected, '%s.%s.npy' % (name, key)), 'c'))
                             for key in ('weight', 'bias')} for name in self.facts['parameters']}
        network.resume_weights(parameters)
        for name, wanted in parameters.items():
            held = [getattr(layers[name], key, None) for key in ('weight', 'bias')] + list(vars(layers[name]).values())
            held = [array for array in held if isinstance(array, np.ndarray)]
            for key, array in wanted.items():
                if not any(other is array or np.array_equal(other, array) or np.array_equal(other.T, array)
                           for other in held):
                    raise Wrong('%s does not hold the checkpoint\'s %s after resume_weights' % (name, key))
        return network

    def another(self, network):
        """A second network with the same parameters, for a second picture: a pass leaves its traces in the layers."""
        arrays = [value for layer in network.graph_layers.values() for value in vars(layer).values()
                  if isinstance(value, np.ndarray)]
        try:
            return copy.deepcopy(network, {id(array): array for array in arrays})
        except Exception:
            return self.network()

    def layer(self, picture, direction, name, layer, given, chain):
        """Run a layer, judge its result and say so; return the result and what is wrong."""
        self.say(enter=direction, layer=name, picture=picture.index)
        result, expected = None, picture.result(direction, name)
        back = direction == 'backward'
        try:
            result = getattr(layer, direction)(given)
            wrong = judge(name, result, expected, (lambda: picture.given('forward', name)) if back else None)
        except (Exception, SystemExit) as error:
            wrong = account(error)
        self.say(direction=direction, layer=name, picture=picture.index, chain=chain, wrong=wrong)
        if back and wrong is None and ('relu' in name or 'maxpool' in name):
            result = expected.astype(result.dtype)    # so that no tie that was decided otherwise is counted later
        return result, wrong

    def run(self, picture, direction, network, given):
        """One pass in which every layer gets what the one before it made; then the layers that it did not reach.

        Returns
        -------
        tuple
            Whether all was right, and what came out at the end.
        """
        layers, seen, wrongs = network.graph_layers, set(), []

        def examine(direction, name, given):
            seen.add(name)
            result, wrong = self.layer(picture, direction, name, layers[name], given, True)
            if wrong:
                wrongs.append(wrong)
                raise Wrong
            return result

        result = None
        if given is not None:
            network.graph_layers = {name: Probe(examine, name) for name in layers}
            try:
                result = getattr(network, direction)(given)
                last = self.names[-1 if direction == 'forward' else 0]
                wrong = judge('', result, picture.result(direction, last))
            except Wrong:
                wrong = None    # said already
            except (Exception, SystemExit) as error:
                wrong = account(error)
            if wrong:
                wrongs.append(wrong)
                self.say(direction=direction, layer='VGG16.' + direction, picture=picture.index, wrong=wrong)
            network.graph_layers = layers
        for name in self.names if direction == 'forward' else reversed(self.names):
            if name not in seen:
                given_right = picture.given(direction, name)
                wrongs.append(self.layer(picture, direction, name, layers[name], given_right, False)[1])
        right = given is not None and not any(wrongs)
        self.say(passed=direction, picture=picture.index, right=right)
        return right, result

    def classified(self, picture, network, main):
        """The class that the submission gives a picture which it makes another tensor of; None if it does not."""
        if not hasattr(main, 'process_image'):
            return None
        self.say(enter='forward', layer='process_image', picture=picture.index)
        try:
            tensor = main.process_image(picture.facts['path'])
            wrong = judge('', tensor, picture.array('tensor'))
            best = int(np.argmax(network.forward(tensor))) if wrong else None
        except (Exception, SystemExit) as error:
            wrong, best = account(error), -1
        if wrong:
            self.say(note='main.py: process_image of %s: %s' % (picture.facts['title'], wrong))
        return best

    def forward(self, picture, network, main):
        """Forward through the whole network, and the class; return whether it is right, and the logits."""
        best = self.classified(picture, network, main)
        right, outputs = self.run(picture, 'forward', network, picture.array('tensor'))
        if right and best is not None and best != picture.facts['class']:
            self.say(note='%s: class %d, should be %d' % (picture.facts['title'], best, picture.facts['class']))
            self.say(passed='forward', picture=picture.index, right=False)
        return right, outputs

    def loss_gradient(self, picture, CrossEntropy, logits):
        """The submission's gradient of the logits, or the right one where it has none or a wrong one."""
        expected = picture.array('backward-loss', picture.facts['dtypes'][self.names[-1]])
        if CrossEntropy is None:
            return expected, None
        self.say(enter='backward', layer='CrossEntropy', picture=picture.index)
        grad = None
        try:
            loss = CrossEntropy()
            value = float(np.mean(loss.forward(logits, np.array([picture.facts['label']]))))
            if abs(value - picture.facts['loss']) > TOLERANCE_OF_ONE * max(1, picture.facts['loss']):
                self.say(note='CrossEntropy: the loss is %.6g, should be %.6g' % (value, picture.facts['loss']))
            grad = loss.backward()
            wrong = judge('', grad, expected)
        except (Exception, SystemExit) as error:
            wrong = account(error)
        self.say(direction='backward', layer='CrossEntropy', picture=picture.index, wrong=wrong)
        return (expected if wrong else grad), wrong

    def backward(self, picture, network, CrossEntropy, logits):
        """Back from the loss through the whole network, or, after a wrong forward pass, layer by layer."""
        if logits is None:
            self.run(picture, 'backward', network, None)
            return False
        grad, wrong = self.loss_gradient(picture, CrossEntropy, logits)
        right, _ = self.run(picture, 'backward', network, grad)
        if wrong:
            self.say(passed='backward', picture=picture.index, right=False)
        return right and not wrong

    def examine(self):
        try:
            network = self.network()
        except (Exception, SystemExit) as error:
            self.say(built=False, wrong=str(error) if isinstance(error, Wrong) else account(error))
            return
        self.say(built=True)

        main, found = None, []
        try:
            main = definitions(os.path.join(os.getcwd(), 'main.py'))
        except (Exception, SystemExit) as error:
            self.say(note='main.py: %s' % account(error))
        for module in ('layer', 'loss'):
            try:
                found.append(__import__(module))
            except (Exception, SystemExit) as error:
                self.say(note='%s.py: %s' % (module, account(error)))
        CrossEntropy = next((module.CrossEntropy for module in [main] + found if hasattr(module, 'CrossEntropy')), None)
        if CrossEntropy is None:
            self.say(note='no CrossEntropy in main.py, layer.py or loss.py: the loss is taken as right')

        pictures = [Picture(self.expected, *args, self.names) for args in enumerate(self.facts['pictures'])]
        networks = [network] + [self.another(network) for _ in pictures[1:]]
        logits = []    # all forward passes first: what is wrong or endless on the way back takes nothing from them
        for picture, network in zip(pictures, networks):
            right, outputs = self.forward(picture, network, main)
            logits.append(outputs if right else None)
            if not right:
                break
        for picture, network, outputs in zip(pictures, networks, logits):
            if not self.backward(picture, network, CrossEntropy, outputs):
                break


def main(expected, submission, events, gigabytes):
    limit(gigabytes)
    os.chdir(submission)
    sys.path[0] = os.getcwd()
    sys.argv[:] = ['main.py']
    with open(events, 'a') as file:
        examination = Examination(expected, file)
        examination.examine()
        examination.say(end=True)


if __name__ == '__main__':
    main(*sys.argv[1:])
