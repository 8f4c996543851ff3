"""What a student starts from: the same tree less the solution, and tests that say what is missing."""
import ast
import os
import re
import subprocess
import sys

import pytest

import handout

TESTS = os.path.dirname(os.path.abspath(__file__))
PROJECT = os.path.dirname(TESTS)

if handout.is_handout(PROJECT):
    pytest.skip('is a hand-out itself', allow_module_level=True)


@pytest.fixture(scope='module')
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp('handout') / 'start'
    done = run([os.path.join(TESTS, 'handout.py'), str(folder)])
    assert (done.returncode, done.stdout.count('\n'), done.stderr) == (0, 5, '')
    return str(folder)


def run(command, **options):
    return subprocess.run([sys.executable] + command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True, **options)


def test_the_tree_is_the_same(start):
    solved = handout.solved(PROJECT)
    paths = [path for path in handout.files_of(PROJECT) if path not in solved]
    assert list(handout.files_of(start)) == paths
    assert os.path.join('tests', 'ladder.py') in solved and os.path.join('tests', 'test_layers.py') not in solved
    assert {'layer.py', 'vgg.py', 'main.py', os.path.join('tests', 'grade.py')} <= set(paths)
    assert not any('.git' + os.sep in path or '__pycache__' in path or 'vgg16_ckpt.npy' in path for path in paths)
    changed = []
    for path in paths:
        with open(os.path.join(PROJECT, path), 'rb') as one, open(os.path.join(start, path), 'rb') as other:
            if one.read() != other.read():
                changed.append(path)
    assert sorted(changed) == sorted(handout.CUTS)


def test_only_the_bodies_and_what_they_alone_needed_are_gone(start):
    """Every line that is left is the package's, but for the TODOs and the handbook's calls of them.

    Every name that is left is defined and needed.
    """
    todos_of_layer = list(handout.TODO.values()) + list(handout.HANDBOOKS_CALLS)
    for path, todos in (('layer.py', todos_of_layer), ('vgg.py', [handout.TODO_NETWORK])):
        before, after = (handout.read(os.path.join(folder, path)) for folder in (PROJECT, start))
        assert [after.count(todo) for todo in todos] == [1] * len(todos)
        assert set(after.split('\n')) <= set(before.split('\n')) | set(''.join(todos).split('\n'))
    before, after = (handout.needed(ast.parse(handout.read(os.path.join(folder, 'layer.py'))))
                     for folder in (PROJECT, start))
    dropped, mentioned = set(before) - set(after), set().union(*after.values())
    assert {'_correlate', '_take_larger'} <= dropped or not {'_correlate', '_take_larger'} <= set(before)
    assert not dropped & mentioned
    assert not [name for name in after if name not in mentioned and name in set().union(*before.values())]


def test_nothing_tells_the_solution(start):
    """No line of the four bodies or of the formulas that computes something is left in a module of the hand-out."""
    source = handout.read(os.path.join(PROJECT, 'layer.py'))
    textbook = handout.read(os.path.join(TESTS, 'textbook.py'))
    places = [(source, place) for _, place in handout.bodies(source).values()]
    tree, secret = ast.parse(textbook), set()
    places += [(textbook, handout.span(textbook.splitlines(True), tree.body, node)) for node in tree.body
               if getattr(node, 'name', None) in handout.FORMULAS]
    assert len(places) == 8
    for text, (first, last) in places:
        secret.update(line.strip() for line in text.splitlines()[first:last] if re.search(r'\] (\+=|=) |y \+= ', line))
    assert len(secret) >= 8
    for path in handout.files_of(start):
        if path.endswith('.py'):
            left = secret.intersection(line.strip() for line in handout.read(os.path.join(start, path)).splitlines())
            assert not left, path


def test_all_tests_can_be_collected(start):
    """None needs a name that went with the bodies before it runs: else none at all would run."""
    done = run(['-m', 'pytest', '-q', '-p', 'no:cacheprovider', '--collect-only', 'tests'], cwd=start)
    assert done.returncode == 0, done.stdout


def test_tests_say_what_to_write(start):
    done = run(['-m', 'pytest', '-q', '-p', 'no:cacheprovider', os.path.join('tests', 'test_layers.py'), '-k',
                'conv or pool or handbook'], cwd=start)
    for owner, name in handout.TODO:
        assert 'NotImplementedError: layer.py line' in done.stdout
        assert '%s.%s is not written yet' % (owner, name) in done.stdout or name.endswith('_back')
    assert done.returncode == 1 and ' passed' not in done.stdout.split('\n')[-2]

    network = 'import vgg\ndef test_it():\n    vgg.VGG16()\n'
    with open(os.path.join(start, 'tests', 'test_network.py'), 'w') as file:
        file.write(network)
    done = run(['-m', 'pytest', '-q', '-p', 'no:cacheprovider', os.path.join('tests', 'test_network.py')], cwd=start)
    os.remove(os.path.join(start, 'tests', 'test_network.py'))
    assert 'the network is not built yet: make the layers from layer2_conv1 to fullyconnect3' in done.stdout


def test_what_is_written_is_not_missing(start, tmp_path):
    """Any change to a body counts as written; the package and a hand-out know which they are."""
    assert [name for _, _, name, _ in handout.unfinished(start)] == ['_conv', '_conv_back', '_pool', '_pool_back',
                                                                     '__init__']
    assert handout.unfinished(PROJECT) == []
    assert handout.is_handout(start) and not handout.is_handout(PROJECT)
    layer, vgg = (handout.read(os.path.join(start, name)) for name in ('layer.py', 'vgg.py'))
    (tmp_path / 'layer.py').write_text(layer.replace('\n\n        return in_grad', '\n        in_grad[:] = 1\n'
                                                     '        return in_grad', 1), encoding='utf-8')
    (tmp_path / 'vgg.py').write_text(vgg.replace('        self.graph_layers = None', '        self.layer2_conv1 = '
                                                 'ConvolutionLayer(64, 128, 3, 1)\n        self.graph_layers = None'),
                                     encoding='utf-8')
    assert [name for _, _, name, _ in handout.unfinished(str(tmp_path))] == ['_conv', '_pool', '_pool_back']


def test_a_grader_or_a_teacher_needs_the_whole_package(start, tmp_path):
    for script, argument in (('handout.py', str(tmp_path / 'again')), ('grade.py', start)):
        done = run([os.path.join(start, 'tests', script), argument])
        assert (done.returncode != 0, done.stdout, done.stderr.count('\n')) == (True, '', 1)
        assert 'whole package' in done.stderr
    assert os.listdir(str(tmp_path)) == []


def test_dead_code_goes_with_the_bodies_and_nothing_else():
    source = '''import numpy as np

LIMIT = 3    # for _deep
# of the public function
SIZE = 4
UNUSED = 5


# what _near needs
@np.vectorize
def _deep(x):
    return _deep(x) + LIMIT


# ---------------------------------------- loops

def _near(x):
    """Two
lines."""
    return _deep(x)


# ---------------------------------------- rest

def public(x):
    return x + SIZE


class MaxPoolLayer(object):
    def forward(self):
        return self._pool_back(1)

    @staticmethod
    @np.vectorize
    def _pool_back(x):
        """Text
at the margin."""
        return _near(x)


class Last(object):
    pass
'''
    assert handout.without_bodies(source) == '''import numpy as np

# of the public function
SIZE = 4
UNUSED = 5


# ---------------------------------------- rest

def public(x):
    return x + SIZE


class MaxPoolLayer(object):
    def forward(self):
        return self._pool_back(1)

%s

class Last(object):
    pass
''' % handout.TODO['MaxPoolLayer', '_pool_back']


@pytest.mark.parametrize('make, words', [
    (lambda folder: os.path.join(PROJECT, 'handout'), 'lies inside this package'),
    (lambda folder: str(folder), 'not empty'),
    (lambda folder: str(folder / 'file'), 'not empty'),
    (lambda folder: str(folder / 'no' / 'start'), 'its folder is not there'),
])
def test_refusals(tmp_path, capsys, make, words):
    (tmp_path / 'file').write_text('mine')
    assert handout.main([make(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out == '' and err.startswith('handout.py: ') and words in err and err.count('\n') == 1
    assert os.listdir(str(tmp_path)) == ['file'] and (tmp_path / 'file').read_text() == 'mine'


def test_a_failure_leaves_nothing_and_an_empty_folder_is_filled(tmp_path, monkeypatch):
    (tmp_path / 'start').mkdir()
    with monkeypatch.context() as broken:
        broken.setitem(handout.CUTS, 'vgg.py', lambda source: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            handout.write(str(tmp_path / 'start'))
    assert os.listdir(str(tmp_path)) == ['start'] and os.listdir(str(tmp_path / 'start')) == []
    handout.write(str(tmp_path / 'start'))
    assert os.listdir(str(tmp_path)) == ['start'] and 'layer.py' in os.listdir(str(tmp_path / 'start'))
