"""Submissions broken in one place each get the score that the rubric gives, and the report names layer and mistake.

They are typed from the handbook's listings, with numpy for the loops and a network of the same 37 layers for pictures
of 32 x 32 with few channels: what it computes takes no time.  The package that says what is right is made alike.  One
test at the end grades the whole network.
"""
import csv
import glob
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import grade
import grade_judge

TESTS = os.path.dirname(os.path.abspath(__file__))
PROJECT = os.path.dirname(TESTS)
TIMEOUT = 12    # seconds, of the endless loop
CHANNELS = {'3': '3', '64': '4', '128': '5', '256': '6', '512': '8', '4096': '32'}

LAYER = '''\
import os
import numpy as np


class ConvolutionLayer(object):
    def __init__(self, in_channels, out_channels, kernel_size, padding=0, stride=1):
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding
        self.weight = np.random.normal(loc=0.0, scale=0.01, size=(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = np.zeros([out_channels])

    def forward(self, inputs):
        self.input_shape = inputs.shape
        batch, channel, height, width = inputs.shape
        P = self.padding
        inputs_pad = np.zeros((batch, channel, height + P * 2, width + P * 2), dtype=inputs.dtype)
        inputs_pad[:, :, P:height + P, P:width + P] = inputs
        out_height = int((height + P * 2 - self.kernel_size) / self.stride + 1)
        out_width = int((width + P * 2 - self.kernel_size) / self.stride + 1)
        outputs = np.zeros((batch, self.out_channels, out_height, out_width), dtype=inputs.dtype)
        return self._conv(inputs_pad, outputs, self.weight, self.bias, self.kernel_size, self.stride)

    def backward(self, out_grad):
        batch, channel, height, width = self.input_shape
        P = self.padding
        in_grad = np.zeros((batch, channel, height + P * 2, width + P * 2))
        in_grad = self._conv_back(out_grad, in_grad, self.weight, self.kernel_size, self.stride)
        return in_grad[:, :, P:height + P, P:width + P]

    def load_params(self, weight, bias):
        assert self.weight.shape == weight.shape
        assert self.bias.shape == bias.shape
        self.weight = weight
        self.bias = bias

    @staticmethod
    def _conv(inputs_pad, outputs, weight, bias, kernel_size, stride):
        h, w = (stride * size for size in outputs.shape[2:])
        outputs += bias[:, None, None]
        for i in range(kernel_size):
            for j in range(kernel_size):
                outputs += np.einsum('ck,nkhw->nchw', weight[:, :, i, j],
                                     inputs_pad[:, :, i:i + h:stride, j:j + w:stride])
        return outputs

    @staticmethod
    def _conv_back(out_grad, in_grad, weight, kernel_size, stride):
        for h in range(out_grad.shape[2]):
            for w in range(out_grad.shape[3]):
                in_grad[:, :, h * stride:h * stride + kernel_size, w * stride:w * stride + kernel_size] += np.tensordot(
                    out_grad[:, :, h, w], weight, 1)
        return in_grad


class MaxPoolLayer(object):
    def __init__(self, kernel_size=2, stride=2):
        self.kernel_size, self.stride = kernel_size, stride

    def forward(self, inputs):
        batch, channel, height, width = inputs.shape
        out_height = int((height - self.kernel_size) / self.stride + 1)
        out_width = int((width - self.kernel_size) / self.stride + 1)
        outputs = np.zeros((batch, channel, out_height, out_width), dtype=inputs.dtype)
        self.input_shape = inputs.shape
        self.argidx = np.zeros_like(outputs, dtype=np.int32)
        outputs, self.argidx = self._pool(outputs, inputs, self.argidx, self.kernel_size, self.stride)
        return outputs

    def backward(self, out_grad):
        return self._pool_back(out_grad, np.zeros(self.input_shape), self.argidx, self.kernel_size, self.stride)

    @staticmethod
    def _pool(outputs, inputs, argidx, kernel_size, stride):
        outputs[:] = -np.inf
        for index in range(kernel_size**2):
            i, j = index // kernel_size, index % kernel_size
            h, w = (stride * size for size in outputs.shape[2:])
            x = inputs[:, :, i:i + h:stride, j:j + w:stride][:, :, :outputs.shape[2], :outputs.shape[3]]
            larger = x > outputs
            outputs[larger], argidx[larger] = x[larger], index
        return outputs, argidx

    @staticmethod
    def _pool_back(out_grad, in_grad, argidx, kernel_size, stride):
        for n, c, h, w in np.ndindex(*out_grad.shape):
            i, j = argidx[n, c, h, w] // kernel_size, argidx[n, c, h, w] % kernel_size
            in_grad[n, c, h * stride + i, w * stride + j] += out_grad[n, c, h, w]
        return in_grad


class ReluLayer(object):
    def forward(self, inputs):
        self.inputs = inputs
        return np.maximum(inputs, 0)

    def backward(self, out_grad):
        return out_grad * (self.inputs > 0)


class FlattenLayer(object):
    def forward(self, inputs):
        self.input_shape = inputs.shape
        batch, channel, height, width = inputs.shape
        return inputs.reshape((batch, channel * height * width))

    def backward(self, grad):
        return grad.reshape(self.input_shape)


class FullyConnectLayer(object):
    def __init__(self, in_features, out_features):
        self.weight, self.bias = np.random.normal(0, 0.01, (out_features, in_features)), np.zeros(out_features)
        self.in_features, self.out_features = in_features, out_features

    load_params = ConvolutionLayer.load_params

    def forward(self, inputs):
        return np.dot(inputs, self.weight.T) + self.bias

    def backward(self, out_grad):
        return np.dot(out_grad, self.weight)
'''

LOSS = '''\
import numpy as np


class CrossEntropy(object):
    def forward(self, inputs, labels):
        power = np.exp(inputs - inputs.max(axis=1, keepdims=True))
        self.prob, self.labels = power / power.sum(axis=1, keepdims=True), labels
        return -np.log(self.prob[np.arange(len(labels)), labels]).mean()

    def backward(self):
        grad = self.prob.copy()
        grad[np.arange(len(grad)), self.labels] -= 1
        return grad / len(grad)
'''

MAIN = '''\
import cv2
import numpy as np
from loss import CrossEntropy
from vgg import VGG16


def process_image(img_path):
    image = cv2.cvtColor(cv2.imread(img_path, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    image = np.array(cv2.resize(image, (32, 32), interpolation=cv2.INTER_AREA), dtype=np.float32)
    image -= [125.307, 122.961, 113.8575]
    image /= [51.5865, 50.847, 51.255]
    return image.transpose((2, 0, 1))[None]


def load_checkpoint(path):
    return np.load(path, allow_pickle=True).item()


if __name__ == '__main__':
    raise SystemExit('a grader runs no script')
'''


def tiny(source):
    """A vgg.py with few channels."""
    source = re.sub(r'512 \* 7 \* 7|25088', '8', source)
    return re.sub(r'((?:in|out)_(?:channels|features)=)(64|128|256|512|4096)',
                  lambda m: m.group(1) + CHANNELS[m.group(2)], source)


def replaced(source, *changes):
    for old, new in changes:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source


def method(owner, text):
    """A method in place of a layer's own, which it can call as the_shipped(...)."""
    name = re.match(r'def (\w+)', text).group(1)
    return 'the_shipped = %s.%s\n%s\n%s.%s = %s\n' % (owner, name, text, owner, name, name)


def unwritten(owner, name, result):
    return '%s.%s = staticmethod(lambda *arguments: arguments[%s])\n' % (owner, name, result)


# argidx as a place in the plane and as int64, gradients in float32
OTHER_INDEX = '''
def other_pool(outputs, inputs, argidx, kernel_size, stride):
    index = np.zeros(outputs.shape, np.int64)
    for n, c, h, w in np.ndindex(*outputs.shape):
        i, j = max(((h * stride + i, w * stride + j) for i in range(kernel_size) for j in range(kernel_size)),
                   key=lambda at: inputs[n, c, at[0], at[1]])
        index[n, c, h, w] = i * inputs.shape[3] + j
        outputs[n, c, h, w] = inputs[n, c, i, j]
    return outputs, index


def other_pool_back(out_grad, in_grad, argidx, kernel_size, stride):
    in_grad = in_grad.astype(np.float32)
    n, c, h, w = in_grad.shape
    for plane in range(n * c):
        index, grad = (array.reshape(n * c, -1)[plane] for array in (argidx, out_grad))
        np.add.at(in_grad.reshape(n * c, -1)[plane], index, grad)
    return in_grad


MaxPoolLayer._pool, MaxPoolLayer._pool_back = staticmethod(other_pool), staticmethod(other_pool_back)
'''

IN_PLACE = '''
class ReluLayer(object):
    def forward(self, inputs):
        self.outputs = np.maximum(inputs, 0, out=inputs)
        return self.outputs

    def backward(self, out_grad):
        out_grad[self.outputs <= 0] = 0
        return out_grad
'''

OLD_LOSS = '''
class CrossEntropy(object):
    def forward(self, inputs, labels):
        self.prob = np.exp(inputs) / np.exp(inputs).sum()
        self.labels = labels
        return -np.log(self.prob[0, labels])

    def backward(self):
        self.prob[0, self.labels] -= 1
        return self.prob.astype(np.float32)
'''

PRINTS = '''
class VGG16(object):
    def __init__(self, num_classes=4):
        self.graph_layers = {}

    def resume_weights(self, ckpt):
        print('reloaded success\\n' * len(ckpt))

    def forward(self, x):
        print('forward: layer1_conv1: -0.1 -15000.0')
        return np.array([[0.1, 0.2, 0.3, 9.0]])

    def backward(self, grad):
        print('backward: fullyconnect3: 0.0 0.0')
        return grad
'''

PAST_AN_ARRAY = '''
from numba import jit
plain_pool = MaxPoolLayer._pool


@jit(nopython=True)
def reading(inputs, outputs):
    batch = len(inputs)
    if %s:
        for n in range(batch):
            outputs[n] = inputs[n, 0, 0, 0 + 2**40]    # of float32: nowhere near
    return outputs


MaxPoolLayer._pool = staticmethod(lambda outputs, inputs, *more: plain_pool(reading(inputs, outputs), inputs, *more))
'''

NO_CONV = unwritten('ConvolutionLayer', '_conv', 1)


class Case(object):
    """A submission: what is added to its layer.py, what is changed in its files, and what has to come out."""

    def __init__(self, score, first_wrong=None, said='', layer='', change=(), **changes):
        self.score, self.first_wrong, self.said, self.layer, self.changes = score, first_wrong, said, layer, changes
        self.changes.update({'layer': change} if change else {})


CASES = {
    'endless loop': Case(80, 'backward layer2_conv1', 'layer2_conv1: slow: no result within %d s' % (TIMEOUT // 4),
                         method('ConvolutionLayer', 'def backward(self, out_grad):\n'
                                '    while self.in_channels == 4 and self.out_channels == 5:\n        pass\n'
                                '    return the_shipped(self, out_grad)')),
    'as shipped': Case(100),
    'scaled gradient': Case(80, 'backward layer5_conv3', '1.0100 times what it should be', method(
        'ConvolutionLayer', 'def backward(self, out_grad):\n    return 1.01 * the_shipped(self, out_grad)')),
    'no padding': Case(60, 'forward layer3_conv2', 'shape (1, 6, 6, 6), should be (1, 6, 8, 8)', vgg=[(
        'self.layer3_conv2 = ConvolutionLayer(in_channels=6, out_channels=6, kernel_size=3, padding=1',
        'self.layer3_conv2 = ConvolutionLayer(in_channels=6, out_channels=6, kernel_size=3')]),
    'padding of ones': Case(60, 'forward layer1_conv1', 'equals the formula with a frame of ones', change=[(
        'inputs_pad = np.zeros(', 'inputs_pad = np.ones(')]),
    'swapped kernel indices': Case(60, 'forward layer1_conv1', 'equals the formula with i and j exchanged', change=[(
        'weight[:, :, i, j]', 'weight[:, :, j, i]')]),
    'swapped kernel indices backward': Case(80, 'backward layer5_conv3', 'equals the formula with i and j', change=[(
        'weight, 1)', 'weight.transpose(0, 1, 3, 2), 1)')]),
    'missing bias': Case(60, 'forward layer1_conv1', 'equals the formula without the bias', change=[(
        'outputs += bias', 'outputs += 0 * bias')]),
    'a row too few': Case(60, 'forward layer1_conv1', 'without the last row', change=[(
        '        return outputs\n\n    @staticmethod\n    def _conv_back',
        '        outputs[:, :, -1] = 0\n        return outputs\n\n    @staticmethod\n    def _conv_back')]),
    'assigned for added': Case(80, 'backward layer5_conv3', 'equals the formula with = for +=', change=[(
        'kernel_size] += np.tensordot', 'kernel_size] = np.tensordot')]),
    'argmax off by one': Case(80, 'backward layer5_maxpool', 'with an index that is one too large', method(
        'MaxPoolLayer', 'def forward(self, inputs):\n    outputs = the_shipped(self, inputs)\n'
        '    self.argidx = (self.argidx + 1) % self.kernel_size**2\n    return outputs')),
    'unfinished _conv': Case(60, 'forward layer1_conv1', 'all zeros', NO_CONV),
    'unfinished _pool_back': Case(80, 'backward layer5_maxpool', 'all zeros',
                                  unwritten('MaxPoolLayer', '_pool_back', 1)),
    'syntax error': Case(0, None, 'SyntaxError', 'def forward(self:\n'),
    'crash': Case(80, 'backward layer3_relu3', 'layer3_relu3: ended the process by SIGABRT', method(
        'ReluLayer', 'def backward(self, out_grad):\n    if out_grad.shape[1] == 6:\n        os.abort()\n'
        '    return the_shipped(self, out_grad)')),
    'too much memory': Case(60, 'forward flatten', 'MemoryError', method(
        'FlattenLayer', 'def forward(self, inputs):\n    return np.ones((2**33, 8))')),
    'much printing': Case(60, 'forward flatten', 'File too large', method(
        'FlattenLayer', 'def forward(self, inputs):\n    for _ in range(100):\n        print("#" * 2**20)\n'
        '    return the_shipped(self, inputs)')),
    'exits': Case(0, None, 'SystemExit', 'raise SystemExit(0)\n'),
    'missing layer': Case(0, None, 'layer 22 of graph_layers should be layer4_conv3, is layer4_relu3', vgg=[(
        "'layer4_conv3': self.layer4_conv3, ", '')]),
    'layers exchanged': Case(0, None, 'layer4_relu3 should be a ReluLayer, is a ConvolutionLayer', vgg=[(
        "'layer4_relu3': self.layer4_relu3", "'layer4_relu3': self.layer4_conv3")]),
    'parameters not taken': Case(0, None, 'layer1_conv1 does not hold', method(
        'ConvolutionLayer', 'def load_params(self, weight, bias):\n    pass')),
    'layer of another size': Case(
        0, None, 'layer4_conv2 has a weight of shape (6, 8, 3, 3), the checkpoint (8, 8, 3, 3): layer.py line', vgg=[
            ('layer4_conv2 = ConvolutionLayer(in_channels=8, out_channels=8', 'layer4_conv2 = ConvolutionLayer(8, 6')]),
    'only prints': Case(0, None, 'layer 1 of graph_layers should be layer1_conv1, is missing', vgg=PRINTS),
    'nearly the tensor': Case(100, None, 'process_image of tulips_demo.jpg: 1.0040 times what it should be', main=[
        ('image.transpose((2, 0, 1))', '1.004 * image.transpose((2, 0, 1))')]),
    'no tensor': Case(60, None, 'process_image of tulips_demo.jpg: main.py line', main=[
        ('return image.', 'return an_image.')]),
    'writes files': Case(100, None, '', 'for name in ("a.txt", os.path.join(os.path.dirname(__file__), "layer.py")):\n'
                         '    open(name, "w").close()\n'),
    'in-place ReLU': Case(100, None, '', IN_PLACE),
    'in-place pooling': Case(80, 'backward layer5_relu3', 'is right when it runs alone', method(
        'ReluLayer', 'def forward(self, inputs):\n'
        '    self.inputs = np.maximum(inputs, 0)\n    return self.inputs') + method(
        'MaxPoolLayer', 'def forward(self, inputs):\n    outputs = the_shipped(self, inputs)\n'
        '    inputs[:] = 0\n    return outputs')),
    'ties to the last': Case(100, None, 'with the index of the last of equal maxima', change=[(
        'x > outputs', 'x >= outputs')]),
    'another argidx': Case(100, None, '', OTHER_INDEX),
    'np.dot and CrossEntropy in layer.py': Case(100, None, '', OLD_LOSS, main=[
        ('from loss import CrossEntropy', 'from layer import CrossEntropy')], loss=None),
    'wrong loss': Case(80, 'backward CrossEntropy', '', loss=[('-= 1', '-= 0.5')]),
    'no main.py': Case(100, None, 'main.py: FileNotFoundError', main=None),
    'layers called past graph_layers': Case(100, vgg=[
        ('        self.create_graph()\n', '        self.create_graph()\n        self.all = dict(self.graph_layers)\n'),
        ('self.graph_layers[name].forward(x)', 'self.all[name].forward(x)')]),
    'return inside the loop': Case(60, 'forward layer1_conv1', 'channels 1 to 3 are zeros', change=[(
        '        return outputs\n\n    @staticmethod\n    def _conv_back',
        '        outputs[:, 1:] = 0\n        return outputs\n\n    @staticmethod\n    def _conv_back')]),
    'past an array': Case(60, 'forward layer1_maxpool',
                          'reads or writes past an array: layer.py line 132: IndexError: ', PAST_AN_ARRAY % 'batch'),
    'past an array of four channels': Case(60, 'forward layer1_maxpool', 'reads or writes past an array: layer.py line',
                                           PAST_AN_ARRAY % 'inputs.shape[1] == 4'),
}


def write(folder, package, case):
    """Write a submission: the package's files, with what a case changes and adds."""
    folder.mkdir()
    for module in ('layer', 'vgg', 'main', 'loss'):
        changes, source = case.changes.get(module, []), (package / (module + '.py')).read_text(encoding='utf-8')
        if changes is not None:
            source = changes if isinstance(changes, str) else replaced(source, *changes)
            (folder / (module + '.py')).write_text(source + (case.layer if module == 'layer' else ''), encoding='utf-8')
    return folder


@pytest.fixture(scope='session')
def package(tmp_path_factory):
    """A package with few channels, and a checkpoint for it."""
    folder = tmp_path_factory.mktemp('package')
    with open(os.path.join(PROJECT, 'vgg.py'), encoding='utf-8') as file:
        vgg = tiny(file.read())
    for name, source in (('layer', LAYER), ('vgg', vgg), ('main', MAIN), ('loss', LOSS)):
        (folder / (name + '.py')).write_text(source, encoding='utf-8')
    rng, ckpt, before = np.random.RandomState(4), {}, 3
    for name, after in [(name, after) for stage, after in enumerate((4, 5, 6, 8, 8))
                        for name in ['layer%d_conv%d' % (stage + 1, i + 1) for i in range(2 + (stage > 1))]]:
        ckpt[name] = {'weight': rng.randn(after, before, 3, 3) * (2 / before / 9)**0.5, 'bias': 0.1 * rng.randn(after)}
        before = after
    for name, before, after in (('1', 8, 32), ('2', 32, 32), ('3', 32, 4)):
        ckpt['fullyconnect' + name] = {'weight': rng.randn(after, before) * (2 / before)**0.5,
                                       'bias': 0.1 * rng.randn(after)}
    ckpt = {name: {key: array.astype(np.float32) for key, array in params.items()} for name, params in ckpt.items()}
    np.save(str(folder / 'ckpt.npy'), ckpt)
    return folder


def run(*arguments, **options):
    """Run grade.py."""
    return subprocess.run([sys.executable, os.path.join(TESTS, 'grade.py')] + list(map(str, arguments)),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, **options)


def graded(*arguments):
    """What grade.py prints."""
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def small(package):
    return ['--package', package, '--ckpt', package / 'ckpt.npy']


def sandboxed():
    """Whether a sandbox can be had here, and if not, why."""
    box = grade.Box([], True, 1, 8, 60)
    return bool(box.options), box.missing


IN_SANDBOX = pytest.param('--sandbox', marks=pytest.mark.skipif(not sandboxed()[0], reason=sandboxed()[1]))


def results_of(cases, package, root, box, *options):
    """Grade cases together: {name: what grade.py found out}, with the report under 'report'."""
    folders = [write(root / name, package, case) for name, case in cases.items()]
    before = {path: path.read_bytes() for path in root.glob('*/*')}
    out = graded(*folders + ['-j', 2, '--json', root / 'all.json', box] + small(package) + list(options))
    assert {path: path.read_bytes() for path in root.glob('*/*') if path.parent != root} == before
    print(out.split('\n\n')[-1].replace(str(root) + os.sep, ''))
    found = json.loads((root / 'all.json').read_text())['submissions']
    return {name: dict(result, report=text) for name, result, text in zip(cases, found, out.strip('\n').split('\n\n'))}


@pytest.fixture(scope='session')
def results(package, tmp_path_factory):
    """All cases, graded in a sandbox where there is one; test_grade_attacks.py goes both ways."""
    box = '--sandbox' if sandboxed()[0] else '--no-sandbox'
    slow = {'endless loop': CASES['endless loop']}
    others = {name: case for name, case in CASES.items() if name not in slow}
    found = results_of(others, package, tmp_path_factory.mktemp('class'), box)
    found.update(results_of(slow, package, tmp_path_factory.mktemp('slow'), box, '--timeout', TIMEOUT))
    return found


@pytest.mark.slow
@pytest.mark.parametrize('name', CASES)
def test_score(name, results):
    case, result = CASES[name], results[name]
    assert result['score'] == case.score, result['report']
    assert result['report'].split('\n')[-1] == 'score: %d' % case.score
    assert case.said in result['report']
    if case.first_wrong:
        assert result['first_wrong'] and result['first_wrong'][:2] == case.first_wrong.split(), result['report']
        assert re.search('first (wrong|slow): %s, %s' % tuple(reversed(case.first_wrong.split())), result['report'])
        assert ('slow in 1 of 13 ConvolutionLayers' in result['report']) == (name == 'endless loop')


def test_compared():
    """Rounding is right; one wrong number, a factor, another shape and what is not finite are not."""
    expected = np.random.RandomState(1).randn(2, 3, 8, 8).astype(np.float32)
    one, channel, frame, part = (expected.copy() for _ in range(4))
    one[1, 2, 3, 4] += 0.001 * abs(expected).max()
    channel[:, 1:] = 0
    frame[:, :, [0, -1]] = frame[:, :, :, [0, -1]] = 0
    part[:, [0, 2], :5] += 1
    with np.errstate(all='ignore'):
        infinite = expected / (expected == one)
    for actual, words in [
            (expected * (1 + 2e-6), None), (expected.astype(np.float64), None), (one, '(1, 2, 3, 4)'),
            (expected * 1.01, '1.0100 times'), (expected * 1.002, '1.0020 times'), (-expected, '-1.0000 times'),
            (expected * 0, 'all zeros'), (expected[:1], 'shape (1, 3, 8, 8), should be (2, 3, 8, 8)'),
            (infinite, '1 of its numbers are not finite, the first at (1, 2, 3, 4)'), (expected[::-1], 'off by'),
            (channel, 'channels 1 to 2 are zeros, the others are right'), (frame, 'right but for its outermost rows'),
            (part, '42 % of its numbers are wrong'), (expected.swapaxes(2, 3), 'rows and columns are exchanged'),
            (expected > 0, 'off by')]:
        why, _ = grade_judge.compared('forward', '', actual, expected)
        assert words in why if words else why is None, (words, why)


def test_a_tie_may_go_either_way_and_nothing_else_may():
    inputs = np.array([[1., 0, 5, 5], [0, 0, 3, 2], [-2, -3, 0, 7], [-4, -5, 7, 7 + 1e-5]])[None, None]
    expected = np.array([[1., 0, 2, 0], [0, 0, 0, 0], [3, 0, 0, 4], [0, 0, 0, 0]])[None, None]

    def wrong(kind, changes):
        actual = expected.copy()
        for h, w, value in changes:
            actual[0, 0, h, w] = value
        why, tied = grade_judge.compared('backward', kind, actual, expected, inputs)
        assert tied == (why is None)
        return why

    pool, relu, conv = 'MaxPoolLayer', 'ReluLayer', 'ConvolutionLayer'
    for changes in ([(0, 2, 0), (0, 3, 2)], [(2, 3, 0), (3, 3, 4)], [(2, 3, 0), (3, 2, 1), (3, 3, 3)]):
        assert wrong(pool, changes) is None and wrong(conv, changes)
    for changes in ([(0, 0, 0), (0, 1, 1)], [(0, 2, 0), (1, 2, 2)], [(0, 2, 0), (0, 3, 2.02)], [(2, 3, 0), (2, 2, 4)]):
        assert wrong(pool, changes)
    assert wrong(relu, [(0, 1, 6), (1, 0, -2)]) is None    # inputs of 0
    assert wrong(relu, [(2, 0, 0)]) and wrong(relu, [(2, 1, 6)])


@pytest.mark.slow
def test_right_layers_after_a_wrong_one_are_not_blamed(results):
    """`no padding` is wrong in one convolution: 36 layers are right, forward and backward, on the right input."""
    found = results['no padding']['layers']
    assert list(found['forward']) == ['layer3_conv2'] == list(found['backward'])
    assert 'forward wrong in 1 of 13 ConvolutionLayers: layer3_conv2\n' in results['no padding']['report']
    assert results['padding of ones']['layers']['forward'].keys() == results['missing bias']['layers']['forward'].keys()
    assert len(results['missing bias']['layers']['forward']) == 13


BEYOND = {
    'the first image alone': ('outputs[:] = -np.inf', 'outputs[0] = -np.inf\n        inputs = inputs[:1]\n'
                              '        outputs, whole = outputs[:1], outputs\n'
                              '        argidx, indices = argidx[:1], argidx',
                              'return outputs, argidx', 'return whole, indices'),
    'a maximum that starts from 0': ('outputs[:] = -np.inf', 'outputs[:] = 0'),
    '= for += where windows overlap': ('stride + j] += out_grad[n, c, h, w]', 'stride + j] = out_grad[n, c, h, w]'),
    'without the stride': ('h * stride:h * stride + kernel_size, w * stride:w * stride + kernel_size] +=',
                           'h:h + kernel_size, w:w + kernel_size] +='),
}


def test_beyond_the_rubric(package, tmp_path):
    """What VGG16 has not got is noted, and costs nothing."""
    cases = {name: Case(100, change=list(zip(changes[::2], changes[1::2]))) for name, changes in BEYOND.items()}
    cases['without the division by the number of images'] = Case(100, loss=[('return grad / len(grad)', 'return grad')])
    cases['without the maximum taken off before exp'] = Case(100, loss=[(' - inputs.max(axis=1, keepdims=True)', '')])
    for name, result in results_of(cases, package, tmp_path, '--no-sandbox').items():
        notes = [note for note in result['notes'] if note.startswith('beyond the rubric: ')]
        assert result['score'] == 100 and any(name in note for note in notes), result['report']


def test_outputs(package, tmp_path):
    """A class with a copy in it: the table, JSON, CSV; pieces put together; Gradescope's file; the exit status."""
    right, wrong, copy = (tmp_path / name for name in ('right', 'wrong', 'copy'))
    write(right, package, Case(100))
    write(wrong, package, CASES['missing bias'])
    shutil.copytree(str(wrong), str(copy / 'EXP'))
    table, pieces, marks = (tmp_path / name for name in ('all.csv', 'all.json', 'results.json'))
    done = run(right, wrong, copy, '--csv', table, '--json', pieces, '--fail-below', 60, '--no-sandbox',
               *small(package))
    assert done.returncode == 0, done.stderr
    assert 'grading without a sandbox: as told' in done.stderr and ' s, without a sandbox)\n' in done.stdout
    with open(str(table), newline='') as file:
        rows = list(csv.DictReader(file))
    assert [row['score'] for row in rows] == ['100', '60', '60']
    assert rows[1]['first wrong layer'] == 'layer1_conv1, forward'
    assert rows[1]['mistake'] == 'equals the formula without the bias' and rows[1]['backward'] == 'not reached'
    assert rows[2]['the same files as'] == str(wrong)
    assert 'the same files as ' + str(wrong) in done.stdout.split('\n')[-2]
    scores = [result['score'] for result in json.loads(pieces.read_text())['submissions']]
    assert scores == [100, 60, 60]

    gathered = run('--table', pieces, pieces, '--csv', tmp_path / 'again.csv', '--fail-below', 80)
    assert gathered.returncode == 1 and gathered.stdout == 2 * done.stdout[done.stdout.rindex('\n\n') + 2:]
    assert len((tmp_path / 'again.csv').read_text().splitlines()) == 7

    assert run(wrong, '--gradescope', marks, *small(package)).returncode == 0
    found = json.loads(marks.read_text())
    assert [(test['score'], test['max_score']) for test in found['tests']] == [(60, 60), (0, 20), (0, 20)]
    assert found['score'] == 60 and 'first wrong: layer1_conv1, forward' in found['output']


def test_one_submission(package, tmp_path):
    """A report ends in the score; a folder in a folder is found; what is there is not overwritten unless told."""
    write(tmp_path / 'nested', package, CASES['missing layer'])
    (tmp_path / 'outer').mkdir()
    os.rename(str(tmp_path / 'nested'), str(tmp_path / 'outer' / 'EXP'))
    pieces = tmp_path / 'mine.json'
    pieces.write_text('notes')
    given = [tmp_path / 'outer', '--json', pieces] + small(package)
    refused = run(*given)
    assert (refused.returncode, refused.stdout, pieces.read_text()) == (2, '', 'notes')
    assert refused.stderr == 'grade.py: %s: is there already: give another name, or --overwrite\n' % pieces
    os.symlink(str(package), str(tmp_path / 'outer' / 'A'))    # right, but no part of the submission
    lines = graded('--overwrite', *given).split('\n')
    assert lines[-2:] == ['score: 0', ''] and lines[0].startswith(str(tmp_path / 'outer')), lines
    assert json.loads(pieces.read_text())['submissions'][0]['score'] == 0
    assert 'score: 0' in graded(tmp_path / 'outer', '--csv', '/dev/stdout', *small(package))


@pytest.mark.parametrize('arguments, words', [
    (['nowhere'], 'nowhere: is no folder'),
    (['.', '--json', os.path.join('nowhere', 'all.json')], 'its folder is not there'),
    (['.', '--json', '.'], 'is a folder'),
    (['.', '--json', 'a', '--csv', os.path.join('.', 'a')], 'is given twice'),
    (['.', '..', '--gradescope', 'a'], 'is for one submission'),
    (['.', '--image', 'nowhere.jpg'], 'nowhere.jpg'),
    (['.', '--ckpt', 'nowhere.npy'], 'nowhere.npy'),
    (['--table', 'nowhere.json'], 'nowhere.json: is not what --json wrote'),
])
def test_wrong_arguments(package, tmp_path, arguments, words):
    given = list(map(str, small(package))) + arguments
    done = run(*given, cwd=str(tmp_path))
    said = [line for line in done.stderr.splitlines() if 'without a sandbox' not in line]
    assert (done.returncode, done.stdout, len(said)) == (2, '', 1), done.stderr
    assert said[0].startswith('grade.py: ') and words in said[0]
    assert os.listdir(str(tmp_path)) == []


def test_without_bubblewrap(package, tmp_path):
    """bwrap that is not there or cannot start: said, and enough to refuse where a sandbox is asked for."""
    write(tmp_path / 'li', package, Case(100))
    (tmp_path / 'bwrap').write_text('#!/bin/sh\necho bwrap: No permissions >&2\nexit 1\n')
    (tmp_path / 'bwrap').chmod(0o755)
    for path, words in ((str(tmp_path), 'bwrap cannot start: bwrap: No permissions'),
                        ('/nowhere', 'no bwrap on the path')):
        environment = dict(os.environ, PATH=path)
        done = run(tmp_path / 'li', *small(package), env=environment)
        assert done.returncode == 0 and 'grade.py: grading without a sandbox: ' + words in done.stderr, done.stderr
        assert 'without a sandbox' in done.stdout.split('\n')[0] and 'score: 100' in done.stdout
        done = run(tmp_path / 'li', '--sandbox', *small(package), env=environment)
        assert (done.returncode, done.stdout) == (2, '') and 'no sandbox: ' + words in done.stderr


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize('box', ['--no-sandbox', IN_SANDBOX])
def test_an_interrupted_grading_leaves_no_process_and_no_file(package, tmp_path, box, number):
    submission, temporary = tmp_path / 'submission', tmp_path / 'tmp'
    submission.mkdir()
    temporary.mkdir()
    (submission / 'layer.py').write_text('')
    (submission / 'vgg.py').write_text('open("running", "w").close()\nwhile True:\n    pass\n')
    signal.signal(signal.SIGINT, signal.default_int_handler)    # a script that starts pytest with & has it ignored
    process = subprocess.Popen([sys.executable, os.path.join(TESTS, 'grade.py'), str(submission), box] +
                               list(map(str, small(package))), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               universal_newlines=True, env=dict(os.environ, TMPDIR=str(temporary)))
    try:
        while not list(temporary.glob('*/*/submission/running')) and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, out, err.split('\n')[-2]) == (130, '', 'grade.py: interrupted')
    assert os.listdir(str(temporary)) == [] and not running(str(temporary)), running(str(temporary))


def running(words):
    """The processes that were started with these words."""
    found = []
    for path in glob.glob('/proc/[0-9]*/cmdline'):
        try:
            with open(path, 'rb') as file:
                if words in file.read().replace(b'\0', b' ').decode(errors='replace'):
                    found.append(path)
        except OSError:    # it has just ended
            pass
    return found


def grade_the_package(folder):
    path = os.path.join(folder, 'all.json')
    out = graded(PROJECT, '--json', path)
    with open(path) as file:
        return out, json.load(file)['submissions'][0]['printed']


@pytest.mark.slow
@pytest.mark.skipif(not glob.glob(os.path.join(PROJECT, 'file', 'vgg16_*.np[yz]')), reason='needs the checkpoint')
@pytest.mark.early(work=grade_the_package)
def test_the_package_itself(early):
    """The whole network, in real time and memory limits."""
    out, printed = early
    assert out.split('\n')[1:] == ['   60  built and loaded: yes', '   80  forward: yes', '  100  backward: yes',
                                   'score: 100', '']
    assert 'forward: layer1_conv1: ' in printed
