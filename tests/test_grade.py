"""Submissions broken in one place each get the score that the rubric gives, and the report names the layer and the mistake.

They are typed from the handbook's listings, with numpy for the loops and a network of the same 37 layers for pictures of
32 x 32 with few channels: what it computes takes no time.  The package that says what is right is made alike.  One test at
the end grades the whole network.
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
        np.add.at(in_grad.reshape(n * c, -1)[plane], argidx.reshape(n * c, -1)[plane], out_grad.reshape(n * c, -1)[plane])
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
    'unfinished _pool_back': Case(80, 'backward layer5_maxpool', 'all zeros', unwritten('MaxPoolLayer', '_pool_back', 1)),
    'syntax error': Case(0, None, 'SyntaxError', 'def forward(self:\n'),
    'crash': Case(80, 'backward layer3_relu3', 'layer3_relu3: ended the process by SIGABRT', method(
        'ReluLayer', 'def backward(self, out_grad):\n    if out_grad.shape[1] == 6:\n        os.abort()\n'
        '    return the_shipped(self, out_grad)')),
    'too much memory': Case(60, 'forward flatten', 'MemoryError', method(
        'FlattenLayer', 'def forward(self, inputs):\n    return np.ones((2**33, 8))')),
    'endless printing': Case(60, 'forward flatten', 'File too large', method(
        'FlattenLayer', 'def forward(self, inputs):\n    while True:\n        print("#" * 2**20)')),
    'exits': Case(0, None, 'SystemExit', 'raise SystemExit(0)\n'),
    'missing layer': Case(0, None, 'layer 22 of graph_layers should be layer4_conv3, is layer4_relu3', vgg=[(
        "'layer4_conv3': self.layer4_conv3, ", '')]),
    'layers exchanged': Case(0, None, 'layer4_relu3 should be a ReluLayer, is a ConvolutionLayer', vgg=[(
        "'layer4_relu3': self.layer4_relu3", "'layer4_relu3': self.layer4_conv3")]),
    'parameters not taken': Case(0, None, 'layer1_conv1 does not hold', method(
        'ConvolutionLayer', 'def load_params(self, weight, bias):\n    pass')),
    'only prints': Case(0, None, 'layer 1 of graph_layers should be layer1_conv1, is missing', vgg=PRINTS),
    'nearly the tensor': Case(100, None, 'process_image of tulips_demo.jpg: 1.0040 times what it should be', main=[
        ('image.transpose((2, 0, 1))', '1.004 * image.transpose((2, 0, 1))')]),
    'no tensor': Case(60, None, 'process_image of tulips_demo.jpg: main.py line', main=[
        ('return image.', 'return an_image.')]),
    'writes files': Case(100, None, '', 'for name in ("a.txt", os.path.join(os.path.dirname(__file__), "layer.py")):\n'
                         '    open(name, "w").close()\n'),
    'in-place ReLU': Case(100, None, '', IN_PLACE),
    'in-place pooling': Case(80, 'backward layer5_relu3', 'is right when it runs alone', method(
        'ReluLayer', 'def forward(self, inputs):\n    self.inputs = np.maximum(inputs, 0)\n    return self.inputs') + method(
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
    'past an array': Case(60, 'forward layer1_maxpool', 'reads or writes past an array: layer.py line', method(
        'MaxPoolLayer', 'def forward(self, inputs):\n    if "NUMBA_DISABLE_JIT" in os.environ:\n'
        '        np.zeros(3)[inputs.shape[2]]\n    os.kill(os.getpid(), 11)')),
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


@pytest.fixture(scope='session', params=['--no-sandbox', IN_SANDBOX])
def results(request, package, tmp_path_factory):
    slow = {'endless loop': CASES['endless loop']}
    others = {name: case for name, case in CASES.items() if name not in slow}
    found = results_of(others, package, tmp_path_factory.mktemp('class'), request.param)
    found.update(results_of(slow, package, tmp_path_factory.mktemp('slow'), request.param, '--timeout', TIMEOUT))
    return found


@pytest.mark.parametrize('name', CASES)
def test_score(name, results):
    case, result = CASES[name], results[name]
    assert result['score'] == case.score, result['report']
    assert result['report'].split('\n')[-1] == 'score: %d' % case.score
    assert case.said in result['report']
    if case.first_wrong:
        assert result['first_wrong'] and result['first_wrong'][:2] == case.first_wrong.split(), result['report']
        assert 'first wrong: %s, %s' % tuple(reversed(case.first_wrong.split())) in result['report']
