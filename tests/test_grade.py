"""Submissions broken in one place each get the score that the rubric gives, and the report names the layer.

They are made of the shipped sources, with a network of the same 37 layers that has fewer channels: what it computes
takes no time, and is examined by the same code.  One test at the end grades the whole network.
"""
import glob
import inspect
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

import grade_worker
import handout
import textbook

TESTS = os.path.dirname(os.path.abspath(__file__))
PROJECT = os.path.dirname(TESTS)
TIMEOUT = 20    # seconds, of the endless loop
CHANNELS = {'3': '3', '64': '4', '128': '5', '256': '6', '512': '8', '4096': '32'}

if handout.is_handout(PROJECT):
    pytest.skip('a hand-out does not know what is right', allow_module_level=True)

# The shipped layer.py under its own name, so that its loops are compiled once for all; with the handbook's forward and
# backward, which call _conv and _conv_back.  They stand on as many lines as ours: numba looks up a function's source.
SHIPPED = '''
import os
import numpy as np
from numba import jit
formula = jit(nopython=True)
with open({path!r}, encoding='utf-8') as file:
    source = file.read()
for ours, handbooks in zip({ours!r}, {handbooks!r}):
    source = source.replace(ours, handbooks)
exec(compile(source, {path!r}, 'exec'))
'''.format(path=os.path.join(PROJECT, 'layer.py'), ours=handout.OUR_CALLS, handbooks=[
    ' ' * 8 + '; '.join(map(str.strip, handbooks.splitlines())) + '\n' * ours.count('\n')
    for ours, handbooks in zip(handout.OUR_CALLS, handout.HANDBOOKS_CALLS)])


def tiny(source):
    """A vgg.py with few channels."""
    return re.sub(r'((?:in|out)_(?:channels|features)=)(\d+)', lambda m: m.group(1) + CHANNELS[m.group(2)], source)


def loops(name, *changes):
    """A formula of textbook.py in place of the shipped loops, after some changes."""
    source = inspect.getsource(getattr(textbook, name).py_func)
    for old, new in changes:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    owner = 'ConvolutionLayer' if 'conv' in name else 'MaxPoolLayer'
    return '%s\n%s._%s = staticmethod(%s)\n' % (source, owner, name, name)


def method(owner, text):
    """A method in place of a layer's own, which it can call as the_shipped(...)."""
    name = re.match(r'def (\w+)', text).group(1)
    return 'the_shipped = %s.%s\n%s\n%s.%s = %s\n' % (owner, name, text, owner, name, name)


def unwritten(owner, name):
    return 'class Unwritten(%s):\n%s\n%s.%s = staticmethod(Unwritten.%s)\n' % (
        owner, handout.TODO[owner, name], owner, name, name)


# argidx as a place in the plane and as int64, gradients in float32
OTHER_INDEX = '''
@formula
def other_pool(outputs, inputs, argidx, kernel_size, stride):
    index = np.zeros(outputs.shape, np.int64)
    for n in range(outputs.shape[0]):
        for c in range(outputs.shape[1]):
            for h in range(outputs.shape[2]):
                for w in range(outputs.shape[3]):
                    index[n, c, h, w] = h * stride * inputs.shape[3] + w * stride
                    for i in range(h * stride, h * stride + kernel_size):
                        for j in range(w * stride, w * stride + kernel_size):
                            at = index[n, c, h, w]
                            if inputs[n, c, i, j] > inputs[n, c, at // inputs.shape[3], at % inputs.shape[3]]:
                                index[n, c, h, w] = i * inputs.shape[3] + j
                    at = index[n, c, h, w]
                    outputs[n, c, h, w] = inputs[n, c, at // inputs.shape[3], at % inputs.shape[3]]
    return outputs, index


def other_pool_back(out_grad, in_grad, argidx, kernel_size, stride):
    in_grad = in_grad.astype(np.float32)
    n, c, h, w = in_grad.shape
    for plane in range(n * c):
        in_grad.reshape(n * c, -1)[plane, argidx.reshape(n * c, -1)[plane]] = out_grad.reshape(n * c, -1)[plane]
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


class Case(object):
    """A submission: what is added to the shipped layer.py, what is changed in other files, and what has to come out."""

    def __init__(self, score, first_wrong=None, layer='', said='', **changes):
        self.score, self.first_wrong, self.layer, self.said, self.changes = score, first_wrong, layer, said, changes


CASES = {
    'endless loop': Case(80, 'backward layer2_conv1', said='layer2_conv1: stopped at the time limit of %d s' % TIMEOUT,
                         layer=method('ConvolutionLayer', 'def backward(self, out_grad):\n'
                                      '    while self.in_channels == 4 and self.out_channels == 5:\n        pass\n'
                                      '    return the_shipped(self, out_grad)')),
    'as shipped': Case(100),
    'scaled gradient': Case(80, 'backward layer5_conv3', said='1.01 times what it should be', layer=method(
        'ConvolutionLayer', 'def backward(self, out_grad):\n    return 1.01 * the_shipped(self, out_grad)')),
    'no padding': Case(60, 'forward layer3_conv2', said='shape', vgg=[(
        'in_channels=6, out_channels=6, kernel_size=3, padding=1', 'in_channels=6, out_channels=6, kernel_size=3')]),
    'padding of ones': Case(60, 'forward layer1_conv1', layer=method(
        'ConvolutionLayer', 'def forward(self, inputs):\n'
        '    self.padding -= 1\n'
        '    padded = np.pad(inputs, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="constant", constant_values=1)\n'
        '    return the_shipped(self, padded)')),
    'swapped kernel indices': Case(60, 'forward layer1_conv1', layer=loops(
        'conv', ('weight[c, k, i, j]', 'weight[c, k, j, i]'))),
    'swapped kernel indices backward': Case(80, 'backward layer5_conv3', layer=loops(
        'conv_back', ('weight[c, k, i, j]', 'weight[c, k, j, i]'))),
    'missing bias': Case(60, 'forward layer1_conv1', layer=loops('conv', ('y = bias[c]', 'y = 0 * bias[c]'))),
    'a row too few': Case(60, 'forward layer1_conv1', layer=loops(
        'conv', ('range(out_height)', 'range(out_height - 1)'))),
    'assigned for added': Case(80, 'backward layer5_conv3', layer=loops('conv_back', ('] += (', '] = ('))),
    'argmax off by one': Case(80, 'backward layer5_maxpool', layer=loops(
        'pool', ('argidx[n, c, h, w] = index', 'argidx[n, c, h, w] = (index + 1) % 4'))),
    'unfinished _conv': Case(60, 'forward layer1_conv1', layer=unwritten('ConvolutionLayer', '_conv')),
    'unfinished _pool_back': Case(80, 'backward layer5_maxpool', said='all zeros',
                                  layer=unwritten('MaxPoolLayer', '_pool_back')),
    'syntax error': Case(0, said='layer.py line 11: SyntaxError', layer='def forward(self:\n'),
    'crash': Case(80, 'backward layer3_relu3', said='layer3_relu3: ended the process by signal 6', layer=method(
        'ReluLayer', 'def backward(self, out_grad):\n    if out_grad.shape[1] == 6:\n        os.abort()\n'
        '    return the_shipped(self, out_grad)')),
    'too much memory': Case(60, 'forward flatten', said='MemoryError', layer=method(
        'FlattenLayer', 'def forward(self, inputs):\n    return np.ones((2**33, 8))')),
    'endless printing': Case(60, 'forward flatten', said='File too large', layer=method(
        'FlattenLayer', 'def forward(self, inputs):\n    while True:\n        print("#" * 2**20)')),
    'exits': Case(0, said='SystemExit', layer='raise SystemExit(0)\n'),
    'missing layer': Case(0, said='layer 22 of graph_layers should be layer4_conv3, is layer4_relu3', vgg=[(
        "'layer4_conv3': self.layer4_conv3, ", '')]),
    'layers exchanged': Case(0, said='layer4_relu3 should be a ReluLayer, is a ConvolutionLayer', vgg=[(
        "'layer4_relu3': self.layer4_relu3", "'layer4_relu3': self.layer4_conv3")]),
    'parameters not taken': Case(0, said='layer1_conv1 does not hold', layer=method(
        'ConvolutionLayer', 'def load_params(self, weight, bias):\n    pass')),
    'only prints': Case(0, vgg=PRINTS),
    'nearly the tensor': Case(100, said='process_image of tulips_demo.jpg: 1.004 times what it should be', main=[
        ('image.transpose((2, 0, 1))', '1.004 * image.transpose((2, 0, 1))')]),
    'no tensor': Case(60, said='process_image of tulips_demo.jpg: main.py line', main=[
        ('return to_tensor(', 'return to_tensors(')]),
    'writes files': Case(100, layer='for name in ("a.txt", os.path.join(os.path.dirname(__file__), "layer.py")):\n'
                                    '    open(name, "w").close()\n'),
    'in-place ReLU': Case(100, layer=IN_PLACE),
    'ties to the last': Case(100, layer=loops('pool', ('x > largest', 'x >= largest'))),
    'another argidx': Case(100, layer=OTHER_INDEX),
    'CrossEntropy in layer.py': Case(100, layer=OLD_LOSS, main=[
        ('from loss import CrossEntropy', 'from layer import CrossEntropy')], loss=None),
    'wrong loss': Case(80, 'backward CrossEntropy', loss=[('-= 1', '-= 0.5')]),
    'plain loops': Case(100, layer=''.join(map(loops, handout.FORMULAS))),
}


@pytest.fixture(scope='session')
def package(tmp_path_factory):
    """A package with few channels, and a checkpoint for it."""
    folder = tmp_path_factory.mktemp('package')
    for path in ['main.py', 'loss.py'] + glob.glob(os.path.join(PROJECT, 'file', '*.py')):
        target = folder / os.path.relpath(os.path.join(PROJECT, path), PROJECT)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(os.path.join(PROJECT, path), str(target))
    (folder / 'layer.py').write_text(SHIPPED, encoding='utf-8')
    (folder / 'vgg.py').write_text(tiny(handout.read(os.path.join(PROJECT, 'vgg.py'))), encoding='utf-8')
    rng, ckpt, before = np.random.RandomState(4), {}, 3
    for name, after in [(name, after) for stage, after in enumerate((4, 5, 6, 8, 8))
                        for name in ['layer%d_conv%d' % (stage + 1, i + 1) for i in range(2 + (stage > 1))]]:
        ckpt[name] = {'weight': rng.randn(after, before, 3, 3) * (2 / before / 9)**0.5, 'bias': 0.1 * rng.randn(after)}
        before = after
    for name, before, after in (('1', 8 * 7 * 7, 32), ('2', 32, 32), ('3', 32, 4)):
        ckpt['fullyconnect' + name] = {'weight': rng.randn(after, before) * (2 / before)**0.5,
                                       'bias': 0.1 * rng.randn(after)}
    ckpt = {name: {key: array.astype(np.float32) for key, array in params.items()} for name, params in ckpt.items()}
    np.save(str(folder / 'ckpt.npy'), ckpt)
    return folder


def graded(*arguments):
    """What grade.py prints."""
    result = subprocess.run([sys.executable, os.path.join(TESTS, 'grade.py')] + list(map(str, arguments)),
                            stdout=subprocess.PIPE, universal_newlines=True)
    assert result.returncode == 0
    return result.stdout


def small(package):
    return ['--package', package, '--ckpt', package / 'ckpt.npy']


@pytest.fixture(scope='session')
def results(package, tmp_path_factory):
    """All cases, graded together: {name: what grade.py found out}, with the report under 'report'."""
    root = tmp_path_factory.mktemp('class')
    for name, case in CASES.items():
        (root / name).mkdir()
        for module in ('layer', 'vgg', 'main', 'loss'):
            changes = case.changes.get(module, [])
            source = changes if isinstance(changes, str) else (package / (module + '.py')).read_text(encoding='utf-8')
            for old, new in changes if isinstance(changes, list) else []:
                assert old in source, old
                source = source.replace(old, new, 1)
            if changes is not None:
                (root / name / (module + '.py')).write_text(source + (case.layer if module == 'layer' else ''),
                                                            encoding='utf-8')
    before = {path: path.read_text(encoding='utf-8') for path in root.glob('*/*')}
    names, found, reports = [name for name in CASES if name != 'endless loop'] + ['endless loop'], [], []
    for some, timeout in ((names[:-1], 300), (names[-1:], TIMEOUT)):
        stdout = graded(*[root / name for name in some] + ['-j', 2, '--timeout', timeout, '--json', root / 'all.json'] +
                        small(package))
        with open(str(root / 'all.json')) as file:
            found += json.load(file)['submissions']
        reports += stdout.strip().split('\n\n')[:len(some)]
        print('\n' + stdout.split('\n\n')[-1].replace(str(root) + os.sep, ''))
    assert {path: path.read_text(encoding='utf-8') for path in root.glob('*/*')} == before
    return {name: dict(result, report=report) for name, result, report in zip(names, found, reports)}


@pytest.mark.parametrize('name', CASES)
def test_score(name, results):
    case, result = CASES[name], results[name]
    assert result['score'] == case.score, result['report']
    assert result['report'].split('\n')[-1] == 'score: %d' % case.score
    assert case.said in result['report']
    if case.first_wrong:
        assert result['first_wrong'][:2] == case.first_wrong.split()
        assert 'first wrong: %s, %s' % tuple(reversed(case.first_wrong.split())) in result['report']


def test_judge():
    """Rounding is right; one wrong number, a factor, another shape and what is not finite are not."""
    expected = np.random.RandomState(1).randn(2, 3, 8, 8).astype(np.float32)
    one = expected.copy()
    one[1, 2, 3, 4] += 0.001 * abs(expected).max()
    with np.errstate(all='ignore'):
        infinite = expected / (expected != one)
    for actual, words in [(expected * (1 + 2e-6), None), (expected.astype(np.float64), None), (one, 'at (1, 2, 3, 4)'),
                          (expected * 1.01, '1.01 times'), (expected * 1.0002, 'off by 0.0002'),
                          (-expected, '-1 times'), (expected * 0, 'all zeros'), (expected[:1], 'shape'),
                          (None, 'returns NoneType'), (infinite, 'not finite'), (expected[::-1], 'off by')]:
        wrong = grade_worker.judge('layer1_conv1', actual, expected)
        assert words in wrong if words else wrong is None


def test_a_tie_may_go_either_way_and_nothing_else_may():
    inputs = np.array([[1., 0, 5, 5], [0, 0, 3, 2], [-2, -3, 0, 7], [-4, -5, 7, 7 + 1e-5]])[None, None]
    expected = np.array([[1., 0, 2, 0], [0, 0, 0, 0], [3, 0, 0, 4], [0, 0, 0, 0]])[None, None]

    def judged(name, changes):
        actual = expected.copy()
        for h, w, value in changes:
            actual[0, 0, h, w] = value
        return grade_worker.judge(name, actual, expected, lambda: inputs)

    pool = 'layer1_maxpool'
    for changes in ([(0, 2, 0), (0, 3, 2)], [(2, 3, 0), (3, 3, 4)], [(2, 3, 0), (3, 2, 1), (3, 3, 3)]):
        assert judged(pool, changes) is None and judged('layer1_conv1', changes)
    for changes in ([(0, 0, 0), (0, 1, 1)], [(0, 2, 0), (1, 2, 2)], [(0, 2, 0), (0, 3, 2.02)], [(2, 3, 0), (2, 2, 4)]):
        assert judged(pool, changes)
    relu = 'layer1_relu1'
    assert judged(relu, [(0, 1, 6), (1, 0, -2)]) is None    # inputs of 0
    assert judged(relu, [(2, 0, 0)]) and judged(relu, [(2, 1, 6)]) and judged('relu1', [(0, 0, 0)])


def test_right_layers_after_a_wrong_one_are_not_blamed(results):
    """`no padding` is wrong in one convolution: 36 layers are right, forward and backward, on the right input."""
    found = results['no padding']['layers']
    assert list(found['forward']) == ['layer3_conv2'] == list(found['backward'])
    assert 'forward wrong in 1 of 13 ConvolutionLayers: layer3_conv2\n' in results['no padding']['report']
    assert results['padding of ones']['layers']['forward'].keys() == results['missing bias']['layers']['forward'].keys()
    assert len(results['missing bias']['layers']['forward']) == 13


def test_one_submission(package, results):
    """A report ends in the score; a folder in a folder is found; plain output has no progress in it."""
    folder = os.path.dirname(results['missing layer']['submission'])
    nested = os.path.join(folder, 'nested')
    shutil.copytree(results['missing layer']['submission'], os.path.join(nested, 'EXP'))
    lines = graded(nested, *small(package)).split('\n')
    assert lines[-2:] == ['score: 0', ''] and lines[0].startswith(nested)
    assert results['missing layer']['report'].split('\n')[1:] == lines[1:-1]


@pytest.mark.parametrize('arguments, words', [
    (['nowhere'], 'nowhere: is no folder'),
    (['.', '--json', os.path.join('nowhere', 'all.json')], 'its folder is not there'),
    (['.', '--image', 'nowhere.jpg'], 'nowhere.jpg: cannot be read'),
    (['.', '--ckpt', 'nowhere.npy'], 'nowhere.npy: no such file'),
])
def test_wrong_arguments(package, tmp_path, arguments, words):
    given = list(map(str, small(package))) + arguments
    done = subprocess.run([sys.executable, os.path.join(TESTS, 'grade.py')] + given, cwd=str(tmp_path),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    assert (done.returncode, done.stdout, done.stderr.count('\n')) == (2, '', 1), done.stderr
    assert done.stderr.startswith('grade.py: ') and words in done.stderr
    assert os.listdir(str(tmp_path)) == []


@pytest.mark.skipif(os.name == 'nt', reason='sends a signal')
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_grading_leaves_no_process_and_no_file(package, tmp_path, number):
    submission, temporary, pid = (tmp_path / name for name in ('submission', 'tmp', 'pid'))
    submission.mkdir()
    temporary.mkdir()
    (submission / 'layer.py').write_text('')
    (submission / 'vgg.py').write_text(
        'import os\nopen(%r, "w").write("%%d\\n" %% os.getpid())\nwhile True:\n    pass\n' % str(pid))
    signal.signal(signal.SIGINT, signal.default_int_handler)    # a script that starts pytest with & has it ignored
    process = subprocess.Popen([sys.executable, os.path.join(TESTS, 'grade.py'), str(submission)] +
                               list(map(str, small(package))), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               universal_newlines=True, env=dict(os.environ, TMPDIR=str(temporary)))
    try:
        while not (pid.exists() and pid.read_text().endswith('\n')) and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
        try:
            os.kill(int(pid.read_text()), signal.SIGKILL)
            left = True
        except ProcessLookupError:
            left = False
    assert (process.returncode, out, err.split('\n')[-2]) == (130, '', 'grade.py: interrupted')
    assert os.listdir(str(temporary)) == [] and not left


def test_handed_out_and_solved(package, tmp_path):
    """What a student starts from grades 0, and 100 with the five bodies put back."""
    handout.write(str(tmp_path / 'start'))
    for name in ('start', 'solved'):
        (tmp_path / name).mkdir(exist_ok=True)
    layer, vgg = (handout.read(str(tmp_path / 'start' / name)) for name in ('layer.py', 'vgg.py'))
    (tmp_path / 'start' / 'vgg.py').write_text(tiny(vgg), encoding='utf-8')
    for (owner, name), todo in handout.TODO.items():
        function = inspect.getsource(getattr(textbook, name[1:]).py_func).replace('@formula\ndef ', 'def _')
        assert layer.count(todo) == 1
        function = '@staticmethod\n@jit(nopython=True)\n' + function
        layer = layer.replace(todo, re.sub('(?m)^(?=.)', '    ', function))
    (tmp_path / 'solved' / 'layer.py').write_text(layer, encoding='utf-8')
    (tmp_path / 'solved' / 'vgg.py').write_text((package / 'vgg.py').read_text(encoding='utf-8'), encoding='utf-8')
    out = graded(tmp_path / 'start', tmp_path / 'solved', *small(package))
    scores = [line for line in out.split('\n') if line.startswith('score: ')]
    assert scores == ['score: 0', 'score: 100'], out
    assert "'VGG16' object has no attribute 'layer2_conv1'" in out


@pytest.mark.skipif(not glob.glob(os.path.join(PROJECT, 'file', 'vgg16_*.np[yz]')), reason='needs the checkpoint')
def test_the_package_itself(tmp_path):
    """The whole network, both pictures, real time and memory limits."""
    out = graded(PROJECT, '--json', tmp_path / 'all.json')
    assert out.split('\n')[1:] == ['   60  built and loaded: yes', '   80  forward: yes', '  100  backward: yes',
                                   'score: 100', '']
    with open(str(tmp_path / 'all.json')) as file:
        found = json.load(file)
    assert len(found['expected']['pictures']) == 2
    assert 'forward: layer1_conv1: ' in found['submissions'][0]['printed']
