"""Write what a student starts from: this package without the five bodies that the handbook marks TODO.

    python tests/handout.py FOLDER

The package itself is the only source.  The bodies are found in its syntax tree, and so are the functions that only
they need, which go with them.  tests/textbook.py loses the same four formulas, being the solution too: tests that
compare with it are skipped, and the ones beside them, which compare with scipy and with numerical gradients, stay.
tests/ladder.py, which makes the loops fast step by step, stays behind, and so does what imports it.
"""
import argparse
import ast
import fnmatch
import glob
import os
import re
import shutil
import sys
import tempfile

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LEFT_OUT = ('.git', '__pycache__', '.pytest_cache', '*.py[co]', '*.nb[ic]', '.venv*', 'venv', '*.part',
            'vgg16_ckpt.npy')

# As in the handbook's listing 2.5.2.
TODO = {
    ('ConvolutionLayer', '_conv'): '''\
    @staticmethod
    @jit(nopython=True)
    def _conv(inputs_pad, outputs, weight, bias, kernel_size, stride):
        # TODO: 根据公式编写下列代码 请用for循环实现
        in_channels = inputs_pad.shape[1]
        batch, out_channels, out_height, out_width = outputs.shape

        return outputs
''',
    ('ConvolutionLayer', '_conv_back'): '''\
    @staticmethod
    @jit(nopython=True)
    def _conv_back(out_grad, in_grad, weight, kernel_size, stride):
        # TODO: 根据公式编写下列代码 请用for循环实现
        in_channels = in_grad.shape[1]
        batch, out_channel, out_height, out_width = out_grad.shape

        return in_grad
''',
    ('MaxPoolLayer', '_pool'): '''\
    @staticmethod
    @jit(nopython=True)
    def _pool(outputs, inputs, argidx, kernel_size, stride):
        # TODO: 根据公式编写下列代码 请用for循环实现
        batch, channel, out_height, out_width = outputs.shape

        return outputs, argidx
''',
    ('MaxPoolLayer', '_pool_back'): '''\
    @staticmethod
    @jit(nopython=True)
    def _pool_back(out_grad, in_grad, argidx, kernel_size, stride):
        # TODO: 根据公式编写下列代码 请用for循环实现
        batch, channel, out_height, out_width = out_grad.shape

        return in_grad
''',
}
# The lines around the calls of these, and the handbook's: a convolution with a frame around the inputs and one that is
# cut off in the end, a pooling with arrays that are cleared beforehand.
OUR_CALLS = '''\
        outputs = np.empty(self.output_shape, dtype=inputs.dtype)
        weight, bias = self._typed(inputs.dtype)
        return _outputs_of_inputs(inputs, outputs, weight, bias, self.kernel_size, self.stride, self.padding)
''', '''\
        in_grad = np.empty((batch, channels, height, width))
        out_grad = out_grad.astype(in_grad.dtype, copy=False)
        weight = np.ascontiguousarray(self.weight)
        if _winograd_goes_back(out_grad, in_grad, self.kernel_size, self.stride):    # the other one is not compiled
            return _gradient_by_winograd(out_grad, in_grad, weight, self.padding)
        return _gradient_of_inputs(out_grad, in_grad, weight, self.kernel_size, self.stride, self.padding)
''', '''\
        outputs = np.empty(self.output_shape, dtype=inputs.dtype)
        argidx = np.empty(self.output_shape, dtype=np.int32)
''', '''\
        in_grad = np.empty(_after_forward(self.input_shape))    # _pool_back clears it
'''
HANDBOOKS_CALLS = '''\
        P = self.padding
        inputs_pad = np.zeros((batch, channels, height + 2 * P, width + 2 * P), dtype=inputs.dtype)
        inputs_pad[:, :, P:height + P, P:width + P] = inputs
        outputs = np.zeros(self.output_shape, dtype=inputs.dtype)
        weight, bias = self._typed(inputs.dtype)
        return self._conv(inputs_pad, outputs, weight, bias, self.kernel_size, self.stride)
''', '''\
        P = self.padding
        in_grad = np.zeros((batch, channels, height + 2 * P, width + 2 * P))
        in_grad = self._conv_back(out_grad, in_grad, np.ascontiguousarray(self.weight), self.kernel_size, self.stride)
        return in_grad[:, :, P:height + P, P:width + P]
''', '''\
        outputs = np.zeros(self.output_shape, dtype=inputs.dtype)
        argidx = np.zeros(self.output_shape, dtype=np.int32)
''', '''\
        in_grad = np.zeros(_after_forward(self.input_shape))
'''
HANDBOOK = {'ConvolutionLayer': '2.5.2.1', 'MaxPoolLayer': '2.5.2.2'}    # where the formulas are
TODO_NETWORK = '        # TODO 根据网络图搭建VGG16模型\n'
FORMULAS = ('conv', 'conv_back', 'pool', 'pool_back')
NO_FORMULAS = '''

def not_handed_out(*arguments):
    """Stands for the formulas that the exercise asks for."""
    import pytest
    pytest.skip('compares with the loops that the exercise asks for')


%s = not_handed_out
''' % ' = '.join(FORMULAS)


class HandoutError(Exception):
    """What keeps a hand-out from being written; the text says what to do."""


def files_of(folder):
    """The files below a folder, relative to it, without links and what a run leaves behind."""
    def kept(name):
        return not any(fnmatch.fnmatch(name, pattern) for pattern in LEFT_OUT)

    for place, folders, files in os.walk(folder):
        folders[:] = sorted(filter(kept, folders))
        for name in sorted(filter(kept, files)):
            path = os.path.join(place, name)
            if os.path.isfile(path) and not os.path.islink(path):
                yield os.path.relpath(path, folder)


def solved(project):
    """The modules of tests/ that show the solution: ladder.py and those that import it, directly or not."""
    names, imports = {'ladder'}, {}
    for path in glob.glob(os.path.join(project, 'tests', '*.py')):
        nodes = [node for node in ast.walk(ast.parse(read(path))) if isinstance(node, (ast.Import, ast.ImportFrom))]
        imports[os.path.basename(path)[:-len('.py')]] = {getattr(node, 'module', None) or alias.name for node in nodes
                                                         for alias in node.names}
    for _ in imports:
        names |= {name for name, others in imports.items() if others & names}
    return {os.path.join('tests', name + '.py') for name in names}


# ------------------------------------------------------------------------------------------- cutting a source

def first_line(node):
    """The line on which a statement starts, its decorators included (Python 3.8 moved a function's own lineno)."""
    return min([node.lineno] + [decorator.lineno for decorator in getattr(node, 'decorator_list', [])])


def span(lines, siblings, node, stop=None):
    """Where a statement and the comment right above it stand: lines[start:stop].

    A statement ends before the next of its siblings; the last one at stop, where that which holds them does.
    """
    start = first_line(node) - 1
    stop = min([first_line(other) - 1 for other in siblings if first_line(other) - 1 > start] + [stop or len(lines)])
    while not lines[stop - 1].strip() or lines[stop - 1].lstrip().startswith('#'):
        stop -= 1
    while start and lines[start - 1].lstrip().startswith('#'):
        start -= 1
    return start, stop


def edited(source, edits):
    """A source with edits {(start, stop): text}; no more than two blank lines and no heading of nothing remain."""
    lines = source.splitlines(True)
    for (start, stop), text in sorted(edits.items(), reverse=True):
        lines[start:stop] = [text]
    source = re.sub(r'\n{4,}', '\n\n\n', ''.join(lines))
    return re.sub(r'(?:^# -{20}.*\n\s*)+(?=^# -{20}|\Z)', '', source, flags=re.MULTILINE)


def bodies(source):
    """{(class, function): (node, its span)} of the functions in TODO that a layer.py has."""
    tree, lines = ast.parse(source), source.splitlines(True)
    return {(owner.name, node.name): (node, span(lines, owner.body, node, span(lines, tree.body, owner)[1]))
            for owner in tree.body if isinstance(owner, ast.ClassDef)
            for node in owner.body if isinstance(node, ast.FunctionDef) and (owner.name, node.name) in TODO}


def needed(tree):
    """{name: the names it mentions} for the statements of a module that define one, as decorators and defaults do."""
    return {name: {other.id for other in ast.walk(node) if isinstance(other, ast.Name)} - {name}
            for node in tree.body for name in defined(node)}


def defined(node):
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return []


def without_bodies(source):
    """A layer.py with its four bodies unwritten, and without what only they needed."""
    for ours, handbooks in zip(OUR_CALLS, HANDBOOKS_CALLS):
        source = source.replace(ours, handbooks)
    before = needed(ast.parse(source))
    roots = set(before) - set().union(*before.values())    # what nothing in the file needs is there for others
    source = edited(source, {place: TODO[key] for key, (_, place) in bodies(source).items()})

    tree, lines = ast.parse(source), source.splitlines(True)
    after, reached, rest = needed(tree), set(), sorted(roots)
    while rest:
        name = rest.pop()
        if name in after and name not in reached:
            reached.add(name)
            rest += after[name]
    dead = [node for node in tree.body if defined(node) and not reached.intersection(defined(node))]
    return edited(source, {span(lines, tree.body, node): '' for node in dead})


def constructor(tree):
    """VGG16.__init__ and the statements in it that make a layer after the first five; None if there is no VGG16."""
    for owner in tree.body:
        for node in getattr(owner, 'body', []):
            if getattr(owner, 'name', None) == 'VGG16' and getattr(node, 'name', None) == '__init__':
                return node, [statement for statement in node.body if isinstance(statement, ast.Assign) and
                              isinstance(statement.value, ast.Call) and
                              not statement.targets[0].attr.startswith('layer1_')]
    return None


def without_network(source):
    """A vgg.py whose VGG16.__init__ stops after the first stage, as the handbook's listing does."""
    lines = source.splitlines(True)
    node, layers = constructor(ast.parse(source))
    first = next(statement for statement in node.body if isinstance(statement, ast.Assign))
    edits = {span(lines, node.body, layer): '' for layer in layers}
    edits[first.lineno - 1, first.lineno - 1] = TODO_NETWORK
    return re.sub(r'\n{3,}(?= {8}\S)', '\n\n', edited(source, edits))


def without_formulas(source):
    """A textbook.py without the formulas that are the solution."""
    tree, lines = ast.parse(source), source.splitlines(True)
    return edited(source, {span(lines, tree.body, node): '' for node in tree.body
                           if getattr(node, 'name', None) in FORMULAS}) + NO_FORMULAS


CUTS = {'layer.py': without_bodies, 'vgg.py': without_network, os.path.join('tests', 'textbook.py'): without_formulas}


# --------------------------------------------------------------------------------------- telling what is missing

def read(path):
    with open(path, encoding='utf-8') as file:
        return file.read()


def is_handout(project):
    """Whether a package was handed out, finished since or not: it does not know by itself what is right."""
    textbook = os.path.join(project, 'tests', 'textbook.py')
    return os.path.exists(textbook) and NO_FORMULAS.strip() in read(textbook)


def unfinished(project):
    """What is still as it was handed out.

    Returns
    -------
    list of tuple
        module, class, function, and a sentence that says what to write.
    """
    found = []
    for (owner, name), (node, _) in bodies(read(os.path.join(project, 'layer.py'))).items():
        todo = ast.parse('class _:\n' + TODO[owner, name]).body[0].body[0]
        if list(map(ast.dump, node.body)) == list(map(ast.dump, todo.body)):
            results = [part.id for part in ast.walk(todo.body[-1]) if isinstance(part, ast.Name)]
            found.append(('layer', owner, name, 'layer.py line %d: %s.%s is not written yet: fill %s with for loops, '
                          'by the formula of handbook %s' % (
                              node.lineno, owner, name, ' and '.join(results), HANDBOOK[owner])))
    node, layers = constructor(ast.parse(read(os.path.join(project, 'vgg.py'))))
    if not layers:
        found.append(('vgg', 'VGG16', '__init__', 'vgg.py line %d: the network is not built yet: make the layers '
                      'from layer2_conv1 to fullyconnect3 that create_graph names' % node.lineno))
    return found


# --------------------------------------------------------------------------------------------------- the command

def write(folder):
    """Write the hand-out into a folder that is new or empty, whole or not at all."""
    folder = os.path.abspath(folder)
    if (os.path.realpath(folder) + os.sep).startswith(os.path.realpath(PROJECT) + os.sep):
        raise HandoutError('%s: lies inside this package: give a folder outside' % folder)
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise HandoutError('%s: is there already, and not empty: give a new folder' % folder)
    if not os.path.isdir(os.path.dirname(folder)):
        raise HandoutError('%s: its folder is not there: make it first' % folder)
    part = tempfile.mkdtemp(prefix=os.path.basename(folder) + '.', suffix='.part', dir=os.path.dirname(folder))
    try:
        for path in sorted(set(files_of(PROJECT)) - solved(PROJECT)):
            target = os.path.join(part, path)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            shutil.copy(os.path.join(PROJECT, path), target)
            if path in CUTS:
                source = CUTS[path](read(target))
                with open(target, 'w', encoding='utf-8', newline='\n') as file:
                    file.write(source)
        os.chmod(part, 0o755)
        if os.path.exists(folder):
            os.rmdir(folder)
        os.rename(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def main(argv=None):
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(description='Write what a student starts from into a new folder.')
    parser.add_argument('folder', metavar='FOLDER')
    folder = parser.parse_args(argv).folder
    try:
        if unfinished(PROJECT):
            raise HandoutError('this package is not finished itself: hand out from the whole package')
        write(folder)
    except (HandoutError, OSError) as error:
        print('handout.py: %s' % error, file=sys.stderr)
        return 1
    print('\n'.join(what for _, _, _, what in unfinished(folder)))
    return 0


if __name__ == '__main__':
    sys.exit(main())
