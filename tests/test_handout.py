"""What a student starts from: whole, the handbook's, telling no solution; and right solutions pass in it."""
import ast
import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
import textwrap

import pytest

import handout
import test_stages
import textbook
from unwritten import BODIES, PROJECT, unwritten


def run(folder, *command, **changes):
    """(exit status, what was printed) of a Python command in a folder."""
    done = subprocess.run([sys.executable, '-B'] + list(command), cwd=folder, env=dict(os.environ, **changes),
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    return done.returncode, done.stdout.decode('utf-8')


def run_tests(folder, *options, **changes):
    return run(folder, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', 'tests', *options, **changes)


def text(*parts):
    return handout.read(*parts).decode('utf-8')


@pytest.fixture(scope='module')
def start(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp('handout') / 'start')
    status, printed = run(PROJECT, os.path.join('tests', 'handout.py'), folder)
    assert (status, printed.count('\n')) == (0, 5), printed
    return folder


# ------------------------------------------------------------------------------------------------ solutions

END = '        self.graph_layers = None\n'
NETWORK = re.search(r' +self.layer2_conv1 = .*?(?=%s)' % END, text(PROJECT, 'vgg.py'), re.DOTALL).group()
SEVEN_LOOPS = {'_' + name: textwrap.dedent(inspect.getsource(getattr(function, 'py_func', function)).split('"""\n')[1])
               for name, function in vars(textbook).items() if '_' + name in BODIES}
SLICES = {'_conv': '''\
    for n in range(outputs.shape[0]):
        for h in range(outputs.shape[2]):
            for w in range(outputs.shape[3]):
                for c in range(outputs.shape[1]):
                    for k in range(inputs_pad.shape[1]):
                        for i in range(kernel_size):
                            for j in range(kernel_size):
                                hs, ws = h * stride, w * stride
                                outputs[n, c, h, w] += inputs_pad[n, k, hs + i, ws + j] * weight[c, k, i, j]
                    outputs[n, c, h, w] += bias[c]
    return outputs
''', '_conv_back': SEVEN_LOOPS['_conv_back'], '_pool': '''\
    for n in range(outputs.shape[0]):
        for c in range(outputs.shape[1]):
            for h in range(outputs.shape[2]):
                for w in range(outputs.shape[3]):
                    hs, ws = h * stride, w * stride
                    window = inputs[n, c, hs:hs + kernel_size, ws:ws + kernel_size]
                    outputs[n, c, h, w] = np.max(window)
                    largest = window[0, 0]
                    for i in range(kernel_size):
                        for j in range(kernel_size):
                            if window[i, j] > largest:
                                largest = window[i, j]
                                argidx[n, c, h, w] = i * kernel_size + j
    return outputs, argidx
''', '_pool_back': SEVEN_LOOPS['_pool_back']}
DOT = dict(SLICES, _conv='''\
    rows = weight.reshape((weight.shape[0], -1))
    for n in range(outputs.shape[0]):
        for h in range(outputs.shape[2]):
            for w in range(outputs.shape[3]):
                hs, ws = h * stride, w * stride
                window = inputs_pad[n, :, hs:hs + kernel_size, ws:ws + kernel_size].copy()
                outputs[n, :, h, w] = np.dot(rows, window.reshape(window.size)) + bias
    return outputs
''', _conv_back='''\
    columns = weight.astype(np.float64).reshape((weight.shape[0], -1)).T.copy()
    for n in range(out_grad.shape[0]):
        for h in range(out_grad.shape[2]):
            for w in range(out_grad.shape[3]):
                hs, ws = h * stride, w * stride
                window = np.dot(columns, out_grad[n, :, h, w].astype(np.float64))
                in_grad[n, :, hs:hs + kernel_size, ws:ws + kernel_size] += window.reshape(
                    (in_grad.shape[1], kernel_size, kernel_size))
    return in_grad
''')
LAYERS_OF_THEIR_OWN = '''

class ReluLayer(object):
    def forward(self, inputs):
        self.passes = inputs >= 0
        inputs *= self.passes
        return inputs

    def backward(self, out_grad):
        out_grad *= self.passes
        return out_grad


class CrossEntropy(object):
    def forward(self, inputs, labels):
        powers = np.exp(inputs - inputs.max(axis=1, keepdims=True))
        self.probabilities, self.right = powers / powers.sum(axis=1, keepdims=True), (np.arange(len(labels)), labels)
        return -np.log(self.probabilities[self.right]).mean()

    def backward(self):
        grad = self.probabilities.copy()
        grad[self.right] -= 1
        return grad / len(grad)
'''
SOLUTIONS = {'seven loops': (SEVEN_LOOPS, ''), 'slices': (SLICES, ''), 'dot': (DOT, LAYERS_OF_THEIR_OWN)}
# Whose network is run as well, which for plain loops takes most of a minute: .ci/run asks for all.
WHOLE = set(SOLUTIONS if os.environ.get('WHOLE') else ['dot'])


def with_bodies(source, bodies):
    """A layer.py with other bodies; each has been found."""
    for name, body in bodies.items():
        source, found = re.subn(r'(    def %s\(.*\n)(?: {8}.*\n|\n)+' % name,
                                lambda match: match.group(1) + textwrap.indent(body, ' ' * 8) + '\n', source)
        assert found == 1, name
    return source


def solve(start, folder, bodies, more=''):
    """A copy of the hand-out, finished."""
    shutil.copytree(start, folder)
    source = with_bodies(text(folder, 'layer.py'), bodies) + more
    with open(os.path.join(folder, 'layer.py'), 'w', encoding='utf-8') as file:
        file.write(source)
    source = text(folder, 'vgg.py').replace(END, NETWORK + END)
    with open(os.path.join(folder, 'vgg.py'), 'w', encoding='utf-8') as file:
        file.write(source)
    if 'CrossEntropy' in more:
        os.remove(os.path.join(folder, 'loss.py'))
    return folder


def with_weights(folder):
    """The checkpoint beside the picture, without expanding it once more."""
    import main
    main.load_checkpoint()
    os.symlink(main.CHECKPOINT, os.path.join(folder, 'file', 'vgg16_ckpt.npy'))


@pytest.mark.parametrize('name', SOLUTIONS)
def test_layers_of_a_right_solution_pass(start, tmp_path, name):
    """As plain Python, which needs no compiling; the network itself is the slow test's."""
    folder = solve(start, str(tmp_path / 'solved'), *SOLUTIONS[name])
    status, printed = run_tests(folder, '-k', '(forward or backward) and not main', NUMBA_DISABLE_JIT='1')
    assert status == 0 and 'skipped' not in printed, printed
    assert unwritten(folder) == {}


def outcome_of(name):
    """Work: the tests of a solution."""
    def work(folder):
        handout.write(os.path.join(folder, 'start'))
        solved = solve(os.path.join(folder, 'start'), os.path.join(folder, 'solved'), *SOLUTIONS[name])
        if name in WHOLE:
            with_weights(solved)
        stages = [run_tests(solved, '--collect-only', '-m', 'stage%d' % stage)[1] for stage in (60, 80, 100)]
        return run_tests(solved, '-vv', *[] if name in WHOLE else ['-k', 'not main']) + (stages,)
    return work


@pytest.mark.slow
@pytest.mark.parametrize('name', [pytest.param(name, marks=pytest.mark.early(work=outcome_of(name))) for name in SOLUTIONS])
def test_a_right_solution_passes(name, early):
    """All stages and all that was handed out, compiled, nothing skipped, whatever the solution's dtypes and ways are."""
    status, printed, stages = early
    assert status == 0 and 'skipped' not in printed, printed
    for collected in stages:
        chosen = [test for test in re.findall(r'^tests/.*::.*', collected, re.MULTILINE)
                  if name in WHOLE or 'main' not in test]
        assert chosen and all(re.search(re.escape(test) + ' +PASSED', printed) for test in chosen)


# ---------------------------------------------------------------------------------------- what a student is told

def test_what_is_not_written_is_said_once_each(start):
    status, printed = run_tests(start, '-rs')
    told = re.findall(r'^(layer.*)$', printed, re.MULTILINE)
    assert status == 1 and len(told) == 5, printed
    assert told[0].startswith('layer2_conv1 is not made yet: vgg.py line ')
    for (name, (owner, _, _)), line in zip(sorted(BODIES.items()), told[1:]):
        place = int(re.match(r'layer.py line (\d+): %s.%s is not written yet: fill ' % (owner, name), line).group(1))
        lines = text(start, 'layer.py').split('\n')
        assert 'def %s(' % name in lines[place - 3] and 'TODO' in lines[place - 2]
    assert len(printed) < 4000 and 'Error' not in printed
    reasons = set(re.findall(r'^SKIPPED .*: (.*)', printed, re.MULTILINE))
    assert reasons == {'ConvolutionLayer._conv is not written yet', 'MaxPoolLayer._pool is not written yet',
                       'the network is not built yet'}


WRONG = {    # mistakes that students make, each beside the first words that it is told in
    'batch': ('_conv', 'return outputs', '    return outputs',
              'ConvolutionLayer.forward of batch 2, planes (2, 3) of (5, 4), window 3, padding 1, stride 1: first '
              'wrong at index (1, 0, 0, 0): expected '),
    'no bias': ('_conv', 'y = bias[c]', 'y = 0.0', 'ConvolutionLayer.forward of batch 1, planes (1, 1) of (3, 3)'),
    'weight turned': ('_conv', 'weight[c, k, i, j]', 'weight[c, k, j, i]',
                      'ConvolutionLayer.forward of batch 1, planes (1, 1) of (3, 3)'),
    'forward stride': ('_conv', 'h * stride + i, w * stride + j', 'h + i, w + j',
                       'ConvolutionLayer.forward of batch 2, planes (2, 3) of (7, 6), window 3, padding 1, stride 2'),
    'stride': ('_conv_back', 'h * stride + i, w * stride + j', 'h + i, w + j',
               'ConvolutionLayer.backward of batch 2, planes (2, 3) of (7, 6), window 3, padding 1, stride 2'),
    'overwritten': ('_conv_back', '+=', '=', 'ConvolutionLayer.backward of batch 1, planes (1, 1) of (3, 3)'),
    'from 0': ('_pool', 'largest, index = inputs[n, c, h * stride, w * stride], 0', 'largest, index = 0, 0',
               'MaxPoolLayer.forward of batch 1, planes 1 of (4, 4), window 2, stride 2: first wrong'),
    'overlaps': ('_pool_back', '+=', '=', 'MaxPoolLayer.backward of batch 2, planes 2 of (6, 7), window 3, stride 2'),
    'columns': ('_pool_back', '// kernel_size', '% kernel_size',
                'MaxPoolLayer.backward of batch 1, planes 1 of (4, 4)'),
}


def first_told(start, tmp_path, monkeypatch, bodies, change=lambda source: source):
    """What the stage tests say first of layers that are not compiled; and that the bodies which are right pass."""
    path = tmp_path / 'layer.py'
    source = change(with_bodies(text(start, 'layer.py'), bodies))
    path.write_text(source.replace('@jit(nopython=True)\n', '\n'), 'utf-8')
    spec = importlib.util.spec_from_file_location('wrong_layer', str(path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ('ConvolutionLayer', 'MaxPoolLayer'):
        monkeypatch.setattr(test_stages, name, getattr(module, name))
    told = {}
    for test, cases in ((test_stages.test_convolution_forward, test_stages.CONVOLUTIONS),
                        (test_stages.test_convolution_backward, test_stages.CONVOLUTIONS),
                        (test_stages.test_pooling_forward, test_stages.POOLINGS),
                        (test_stages.test_pooling_backward, test_stages.POOLINGS)):
        for case in cases:
            try:
                test(case)
            except pytest.fail.Exception as failure:
                told.setdefault(test.__name__[len('test_'):], str(failure))
    return told


@pytest.mark.parametrize('name', WRONG)
def test_a_mistake_is_told_in_a_line(start, tmp_path, monkeypatch, name):
    body, right, wrong, words = WRONG[name]
    assert right in SEVEN_LOOPS[body]
    bodies = dict(SEVEN_LOOPS, **{body: SEVEN_LOOPS[body].replace(right, wrong)})
    told = first_told(start, tmp_path, monkeypatch, bodies)
    test = ('pooling' if 'pool' in body else 'convolution') + ('_backward' if 'back' in body else '_forward')
    assert told.pop(test).startswith(words) and not set(told) - {'pooling_backward'}


def test_a_gradient_with_its_frame_is_told_by_its_shape(start, tmp_path, monkeypatch):
    told = first_told(start, tmp_path, monkeypatch, SEVEN_LOOPS,
                      lambda source: re.sub(r' *in_grad = in_grad\[:, :, .*\n', '', source))
    assert told == {'convolution_backward': 'ConvolutionLayer.backward of batch 1, planes (1, 1) of (4, 4), window 3, '
                                            'padding 1, stride 1: shape (1, 1, 4, 4) expected, found (1, 1, 6, 6)'}


def test_an_index_past_an_array_is_told_with_its_line(start, tmp_path):
    """In compiled loops, which without numba's check would read what lies there, or crash."""
    line = 'y += weight[c, k, i, j] * inputs_pad[n, k, h * stride + i, w * stride + j%s]'
    wrong = SEVEN_LOOPS['_conv'].replace(line % '', line % ' + 5000')
    assert wrong != SEVEN_LOOPS['_conv']
    folder = solve(start, str(tmp_path / 'wrong'), dict(SEVEN_LOOPS, _conv=wrong))
    place = 1 + next(place for place, other in enumerate(text(folder, 'layer.py').split('\n')) if '5000' in other)
    status, printed = run_tests(folder, '-k', 'convolution_forward', '-x')
    assert status == 1
    assert ('\nConvolutionLayer.forward of batch 1, planes (1, 1) of (3, 3), window 2, padding 0, stride 1: layer.py '
            'line %d, `%s`: IndexError: index 5000 is out of bounds for axis 3 with size 3\n' % (
                place, line % ' + 5000')) in printed


# ------------------------------------------------------------------------------------------- what is handed out

def test_what_is_handed_out(start):
    """Neither more nor less than it says; every file that is named is there, and nothing but what is handed out."""
    paths = {os.path.relpath(os.path.join(place, name), start) for place, _, names in os.walk(start) for name in names}
    assert paths == set(handout.START + handout.COPIED)
    assert not [path for path in paths if re.search('grade|bench|ladder|mistakes|textbook|train|draw|handout|measured', path)]
    made = {'file/vgg16_ckpt.npy'}
    for path in paths:
        if path.endswith(('.py', '.md', 'output.txt')):
            pattern = r'(?<![\w/])(?:(?:file|tests)/[\w/]+\.\w+|(?:main|layer|vgg|loss)\.py)'
            assert set(re.findall(pattern, text(start, path))) <= paths | made, path


def test_readme_is_one_page_and_its_commands_work(start):
    readme = text(start, 'README.md')
    assert readme.count('\n') < 60 and readme.index('五处') < readme.index('Five places')
    status, printed = run_tests(start, '-x', '-m', re.search('-m (stage60)', readme).group(1))
    assert status == 1 and printed.splitlines()[-1].startswith('1 failed, '), printed
    for name in BODIES:
        assert readme.count('`%s.%s`' % (BODIES[name][0], name)) == 2


def interface(source, kept=lambda name: True):
    """{class: {method: arguments and decorators}} of a module."""
    return {owner.name: {node.name: ([argument.arg for argument in node.args.args], len(node.args.defaults))
                         for node in owner.body if isinstance(node, ast.FunctionDef) and kept(node.name)}
            for owner in ast.parse(source).body if isinstance(owner, ast.ClassDef)}


def test_layers_and_network_have_the_packages_interface(start):
    """Every class and method of a hand-out is one of the package's, with the same arguments."""
    for path in ('layer.py', 'vgg.py'):
        given, ours = interface(text(start, path)), interface(text(PROJECT, path))
        for owner in given:
            assert given[owner].items() <= ours[owner].items()
    assert text(start, 'layer.py').count('@jit(nopython=True)\n') == text(start, 'layer.py').count('jit(') == 6
    assert text(start, 'layer.py').count('\n') < 240


# ------------------------------------------------------------------------------------------------- refusals

@pytest.fixture
def package(tmp_path):
    """A copy of what a hand-out is made of, to be changed."""
    folder = str(tmp_path / 'package')
    shutil.copytree(PROJECT, folder, ignore=shutil.ignore_patterns(
        '.git', '.ci', '.venv*', '.pytest_cache', '__pycache__', '*.npy', '*.npz', '*.part'))
    os.symlink(os.path.join(PROJECT, 'file', 'vgg16_flowers.npz'), os.path.join(folder, 'file', 'vgg16_flowers.npz'))
    return folder


def refusal(package, folder):
    """The line that handout.py refuses with; it has left nothing."""
    before = os.listdir(os.path.dirname(folder))
    with pytest.raises((handout.HandoutError, OSError)) as refused:
        handout.write(folder, package)
    assert os.listdir(os.path.dirname(folder)) == before
    return str(refused.value)


def change(package, path, old, new):
    source = text(package, path)
    assert old in source
    with open(os.path.join(package, path), 'w', encoding='utf-8') as file:
        file.write(source.replace(old, new, 1))


@pytest.mark.parametrize('path, old, new, words', [
    ('tests/start/README.md', 'ReLU', '`y += weight[c, k, i, j] * inputs_pad[n, k, h * S + i, w * S + j]`',
     'README.md tells the solution, `inputs_pad'),
    ('tests/start/layer.py', 'import numpy',
     '# in_grad[n, c, h*stride+i, w*stride+j] += out_grad[n, c, h, w]\nimport numpy',
     'layer.py tells the solution, `in_grad'),
    ('tests/compare.py', 'LOSS =', "HINT = 'largest, index = inputs[n, c, h * S, w * S], 0'\nLOSS =",
     'tests/compare.py tells the solution, `largest,index='),
    ('tests/start/vgg.py', END, NETWORK + END, 'vgg.py tells the solution, `self.'),
    ('main.py', 'is not made yet', 'is missing', 'should say that layer2_conv1 is not made yet; it says: main.py: '),
    ('main.py', 'import cv2', 'import cv3', "it says: ModuleNotFoundError: No module named 'cv3'"),
])
def test_what_tells_the_solution_or_says_nothing_is_not_handed_out(package, tmp_path, path, old, new, words):
    change(package, path, old, new)
    assert words in refusal(package, str(tmp_path / 'start'))


@pytest.mark.parametrize('name', BODIES)
def test_a_body_that_is_written_is_not_handed_out(package, tmp_path, name):
    source = with_bodies(text(package, 'tests/start/layer.py'), {name: 'return np.zeros(3)\n'})
    with open(os.path.join(package, 'tests', 'start', 'layer.py'), 'w', encoding='utf-8') as file:
        file.write(source)
    assert refusal(package, str(tmp_path / 'start')) == 'layer.py of tests/start has a body for %s: empty it' % name


def test_only_the_whole_package_hands_out(package, tmp_path):
    shutil.copy(os.path.join(package, 'tests', 'start', 'layer.py'), os.path.join(package, 'layer.py'))
    shutil.copy(os.path.join(package, 'tests', 'start', 'vgg.py'), os.path.join(package, 'vgg.py'))
    with open(os.path.join(package, 'tests', 'textbook.py'), 'w') as file:
        file.write('')
    assert 'hand out from the whole package' in refusal(package, str(tmp_path / 'start'))


@pytest.mark.parametrize('make, words', [
    (lambda folder: os.path.join(PROJECT, 'start'), 'lies inside this package'),
    (lambda folder: str(folder), 'is there already'),
    (lambda folder: str(folder / 'file'), 'is there already'),
    (lambda folder: str(folder / 'no' / 'start'), 'its folder is not there'),
])
def test_nothing_that_is_there_is_touched(tmp_path, capsys, make, words):
    (tmp_path / 'file').write_text('mine')
    assert handout.main([make(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out == '' and err.startswith('handout.py: ') and words in err and err.count('\n') == 1
    assert os.listdir(str(tmp_path)) == ['file'] and (tmp_path / 'file').read_text() == 'mine'


def test_an_empty_folder_is_filled_and_a_hand_out_that_was_worked_on_is_kept(tmp_path):
    folder = str(tmp_path / 'start')
    os.mkdir(folder)
    handout.write(folder)
    handout.write(folder)    # nothing to do
    with open(os.path.join(folder, 'layer.py'), 'a') as file:
        file.write('# mine')
    assert 'is there already' in refusal(PROJECT, folder)
    assert text(folder, 'layer.py').endswith('# mine') and os.listdir(str(tmp_path)) == ['start']
