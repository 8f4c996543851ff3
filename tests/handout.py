"""Write what a student starts from: the handbook's listings with their bodies unwritten, and what belongs to them.

    python tests/handout.py FOLDER

layer.py, vgg.py and README.md of a hand-out lie in tests/start.  The rest is copied from this package: main.py and
loss.py, the picture and the weights, the tests of the rubric's steps, and compare.py.  What shows the solution, and
what is for teachers, stays behind.  The result is examined before it gets its name; nothing is left of one that tells
the solution.
"""
import argparse
import ast
import filecmp
import os
import re
import shutil
import subprocess
import sys
import tempfile

from unwritten import BODIES, PROJECT, unwritten

START = ('README.md', 'layer.py', 'vgg.py')
COPIED = ('main.py', 'loss.py', 'requirements.txt', '.gitignore', 'file/tulips_demo.jpg', 'file/vgg16_flowers.npz',
          'file/expected_output.txt', 'file/expected_tensors.txt', 'file/making/expand.py', 'tests/compare.py',
          'tests/conftest.py', 'tests/network.py', 'tests/picture.py', 'tests/tensors.py', 'tests/test_stages.py',
          'tests/unwritten.py')


class HandoutError(Exception):
    """What keeps a hand-out from being written; the text says what to do."""


def read(*parts):
    with open(os.path.join(*parts), 'rb') as file:
        return file.read()


def without_blanks(text):
    return ''.join(text.split())


def solution(project):
    """What must not be handed out, without blanks: where loops index planes, and the lines that make the network."""
    found = set()
    for path in ('layer.py', 'vgg.py', 'tests/textbook.py'):
        source = read(project, path).decode('utf-8')
        functions = {node.name: node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}
        names, rest = set(), ['__init__'] if path == 'vgg.py' else list(BODIES) + [name[1:] for name in BODIES]
        while rest:    # these, and what they call
            name = rest.pop()
            if name in functions and name not in names:
                names.add(name)
                rest += [node.id for node in ast.walk(functions[name]) if isinstance(node, ast.Name)]
        places = {node.lineno for name in names for node in ast.walk(functions[name]) if hasattr(node, 'lineno')}
        for line in (line for place, line in enumerate(source.splitlines(), 1) if place in places):
            line = without_blanks(line)
            if re.search(r'\w\[[^]]*[,*+][^]]*\]', line) or re.search(r'=\w+Layer\(', line) and 'layer1_' not in line:
                found.add(line)
            found.update(re.findall(r'\w+\[[^]]*\*[^]]*\+[^]]*\]', line))
    return found


def examine(folder, project):
    """HandoutError where a hand-out is finished, works or tells how."""
    written = [name for name in BODIES if name not in unwritten(folder)]
    if written:
        raise HandoutError('layer.py of tests/start has a body for %s: empty it' % ', '.join(written))
    secret = solution(project)
    if len(secret) < 20:
        raise HandoutError('the solution is not found in layer.py and vgg.py: hand out from the whole package')
    for path in START + COPIED:
        if not path.endswith(('.jpg', '.npz')):
            text = without_blanks(read(folder, path).decode('utf-8'))
            told = sorted(part for part in secret if part in text)
            if told:
                raise HandoutError('%s tells the solution, `%s`: take it out' % (path, max(told, key=len)))
    ran = subprocess.run([sys.executable, '-B', os.path.join(folder, 'main.py')], stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, universal_newlines=True)
    if not re.match(r'main.py: layer2_conv1 is not made yet: vgg.py line \d+\n\Z', ran.stderr) or ran.stdout:
        raise HandoutError('main.py of the hand-out should say that layer2_conv1 is not made yet; it says: %s' % (
            (ran.stderr or ran.stdout).strip().split('\n')[-1]))


def write(folder, project=PROJECT):
    """Write the hand-out, whole or not at all, into a folder that is new, empty or one that nobody has worked on."""
    folder = os.path.abspath(folder)
    parent = os.path.dirname(folder)
    sources = [(path, os.path.join(project, 'tests', 'start', path)) for path in START]
    sources += [(path, os.path.join(project, path)) for path in COPIED]
    if (os.path.realpath(folder) + os.sep).startswith(os.path.realpath(project) + os.sep):
        raise HandoutError('%s: lies inside this package: give a folder outside' % folder)
    if not os.path.isdir(parent):
        raise HandoutError('%s: its folder is not there: make it first' % folder)
    part = tempfile.mkdtemp(prefix=os.path.basename(folder) + '.', suffix='.part', dir=parent)
    try:
        for path, source in sources:
            os.makedirs(os.path.dirname(os.path.join(part, path)), exist_ok=True)
            shutil.copyfile(source, os.path.join(part, path))
        examine(part, project)
        if not os.path.lexists(folder) or os.path.isdir(folder) and not os.listdir(folder):
            os.chmod(part, 0o755)
            os.rename(part, folder)
        elif filecmp.cmpfiles(part, folder, START + COPIED, shallow=False)[1:] != ([], []):
            raise HandoutError('%s: is there already, and not as it would be handed out: give a new folder' % folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def main(argv=None):
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(description='Write what a student starts from into a new folder.')
    parser.add_argument('folder', metavar='FOLDER')
    folder = parser.parse_args(argv).folder
    try:
        write(folder)
    except (HandoutError, OSError) as error:
        print('handout.py: %s' % error, file=sys.stderr)
        return 1
    print('\n'.join(unwritten(folder).values()))
    print('vgg.py: the network is not built yet: it ends at layer1_maxpool')
    return 0


if __name__ == '__main__':
    sys.exit(main())
