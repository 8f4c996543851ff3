"""mistakes.py finds what was changed in the textbook's loops, each of its mistakes, and nothing in right ones."""
import inspect
import re
from types import SimpleNamespace

import numpy as np
import pytest

import mistakes
import textbook

LAYERS = {    # a layer's forward and backward around the textbook's loops, as in the handbook's listings
    ('ConvolutionLayer', 'forward'): '''
def run(c):
    P = c.P
    N, C, H, W = c.x.shape
    inputs_pad = np.zeros((N, C, H + 2 * P, W + 2 * P))
    inputs_pad[:, :, P:H + P, P:W + P] = c.x
    outputs = np.zeros((N, len(c.weight), (H + 2 * P - c.K) // c.S + 1, (W + 2 * P - c.K) // c.S + 1))
    return conv(inputs_pad, outputs, c.weight, c.bias, c.K, c.S)
''', ('ConvolutionLayer', 'backward'): '''
def run(c):
    P = c.P
    N, C, H, W = c.x.shape
    in_grad = conv_back(c.g, np.zeros((N, C, H + 2 * P, W + 2 * P)), c.weight, c.K, c.S)
    return in_grad[:, :, P:H + P, P:W + P]
''', ('MaxPoolLayer', 'forward'): '''
def run(c):
    return pool(np.zeros(c.g.shape), c.x, np.zeros(c.g.shape, np.int32), c.K, c.S)[0]
''', ('MaxPoolLayer', 'backward'): '''
def run(c):
    _, argidx = pool(np.zeros(c.g.shape), c.x, np.zeros(c.g.shape, np.int32), c.K, c.S)
    return pool_back(c.g, np.zeros(c.x.shape), argidx, c.K, c.S)
''', ('ReluLayer', 'forward'): '''
def run(c):
    return np.where(c.x > 0, c.x, 0)
''', ('ReluLayer', 'backward'): '''
def run(c):
    return np.where(c.x > 0, c.g, 0)
''', ('FlattenLayer', 'forward'): '''
def run(c):
    N, C, H, W = c.x.shape
    return c.x.reshape((N, C * H * W))
''', ('FlattenLayer', 'backward'): '''
def run(c):
    N, C, H, W = c.x.shape
    return c.g.reshape((N, C, H, W))
''', ('FullyConnectLayer', 'forward'): '''
def run(c):
    return fully_connect(c.x, np.zeros((len(c.x), len(c.weight))), c.weight, c.bias)
''', ('FullyConnectLayer', 'backward'): '''
def run(c):
    return fully_connect_back(c.g, np.zeros(c.x.shape), c.weight)
''', ('CrossEntropy', 'forward'): '''
def run(c):
    x = c.x - c.x.max(axis=1, keepdims=True)
    total = np.exp(x).sum(axis=1)
    p = np.exp(x) / total[:, None]
    return -np.log(p[np.arange(len(x)), c.labels]).mean()
''', ('CrossEntropy', 'backward'): '''
def run(c):
    x = c.x - c.x.max(axis=1, keepdims=True)
    grad = np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
    grad[np.arange(len(x)), c.labels] -= 1
    return grad / len(x)
'''}
LOOPS = {'ConvolutionLayer': 'conv', 'MaxPoolLayer': 'pool', 'FullyConnectLayer': 'fully_connect'}
CONV, CONV_BACK, POOL, POOL_BACK, RELU, RELU_BACK, FLATTEN, FLATTEN_BACK, FULL, FULL_BACK, LOSS, LOSS_BACK = LAYERS
WRITE = 'in_grad[n, k, h * stride + i, w * stride + j] += (\n'
TAKEN = 'inputs[n, c, h * stride + i, w * stride + j]'
BACK = 'in_grad[n, c, h * stride + i, w * stride + j] += out_grad[n, c, h, w]'
SPREAD = ('in_grad[n, c, h * stride:h * stride + kernel_size, w * stride:w * stride + kernel_size] += '
          'out_grad[n, c, h, w]')
NOTED = 'argidx[n, c, h, w] = index'
SOFTMAX = 'x = c.x - c.x.max(axis=1, keepdims=True)'


def returning(loop):
    """A change: `return` stands in a loop and not after all of them."""
    def change(source):
        indent, result = re.search('( +)for %s in' % loop, source).group(1), re.search('return .*', source).group()
        return source.replace('\n    ' + result, '\n' + indent + '    ' + result + '\n    ' + result)
    return change


def loop(name, number):
    """A change: another number of steps in a loop; N is the right one."""
    return lambda source: re.sub(r'for %s in range\((.*)\)' % name, lambda match: 'for %s in range(%s)' % (
        name, number.replace('N', match.group(1))), source, count=1)


WINDOW = [loop('i', 'N - 1'), loop('j', 'N - 1')]
MUTANTS = [    # (layer and direction, a part of the words, changes)
    (CONV, 'without the bias', ('y = bias[c]', 'y = 0')),
    (CONV, 'without padding', ('P = c.P', 'P = 0')),
    (CONV, 'frame of ones', ('inputs_pad = np.zeros(', 'inputs_pad = np.ones(')),
    (CONV, 'border repeated', ('H + P, P:W + P] = c.x', 'H + P, P:W + P] = c.x\n    inputs_pad = np.pad('
                               'c.x, ((0, 0), (0, 0), (P, P), (P, P)), mode="edge")')),
    (CONV, 'frame at the bottom', (':, :, P:H + P, P:W + P] = c.x', ':, :, :H, :W] = c.x')),
    (CONV, 'turned by 180', ('weight[c, k, i, j]', 'weight[c, k, kernel_size - 1 - i, kernel_size - 1 - j]')),
    (CONV, 'i and j exchanged', ('weight[c, k, i, j]', 'weight[c, k, j, i]')),
    (CONV, 'h and w exchanged', ('[n, k, h * stride + i, w * stride + j]', '[n, k, w * stride + i, h * stride + j]')),
    (CONV, 'channels exchanged', ('weight[c, k, i, j]', 'weight[k, c, i, j]')),
    (CONV, 'without the stride', ('h * stride + i, w * stride + j', 'h + i, w + j')),
    (CONV, 'stride for rows alone', ('w * stride', 'w')),
    (CONV, 'stride for columns alone', ('h * stride', 'h')),
    (CONV, 'first input channel alone', loop('k', '1')),
    (CONV, 'without the last input channel', loop('k', 'N - 1')),
    (CONV, 'without the last row and column of the window') + tuple(WINDOW),
    (CONV, 'the last product is left', ('y += ', 'y = ')),
    (CONV, 'the last product and the bias', ('y += ', 'y = bias[c] + ')),
    (CONV, 'bias added to each product', ('y = bias[c]', 'y = 0'), ('y += ', 'y += bias[c] + ')),
    (CONV, "first channel's bias", ('bias[c]', 'bias[0]')),
    (CONV, 'first image for all', ('inputs_pad[n, k,', 'inputs_pad[0, k,')),
    (CONV, 'ReLU', ('outputs[n, c, h, w] = y', 'outputs[n, c, h, w] = max(y, 0)')),

    (CONV_BACK, 'the last write is left', (WRITE, WRITE.replace('+=', '='))),
    (CONV_BACK, '= for += where windows overlap', lambda source: source.replace('for c in range(out_channels)', (
        'for c in range(1)')).replace('out_grad[n, c, h, w] * weight[c, k, i, j]', (
            '(out_grad[n, :, h, w] * weight[:, k, i, j]).sum()')).replace('+=', '=')),
    (CONV_BACK, 'not cut off', ('in_grad[:, :, P:H + P, P:W + P]', 'in_grad')),
    (CONV_BACK, 'one too early', ('P:H + P, P:W + P', 'P - 1:H + P - 1, P - 1:W + P - 1')),
    (CONV_BACK, 'one too late', ('P:H + P, P:W + P', 'P + 1:H + P + 1, P + 1:W + P + 1')),
    (CONV_BACK, 'turned by 180', ('weight[c, k, i, j]', 'weight[c, k, kernel_size - 1 - i, kernel_size - 1 - j]')),
    (CONV_BACK, 'i and j exchanged', ('weight[c, k, i, j]', 'weight[c, k, j, i]')),
    (CONV_BACK, 'h and w exchanged', ('out_grad[n, c, h, w]', 'out_grad[n, c, w, h]')),
    (CONV_BACK, 'channels exchanged', ('weight[c, k, i, j]', 'weight[k, c, i, j]')),
    (CONV_BACK, 'without the stride', ('h * stride + i, w * stride + j', 'h + i, w + j')),
    (CONV_BACK, 'stride for rows alone', ('w * stride', 'w')),
    (CONV_BACK, 'stride for columns alone', ('h * stride', 'h')),
    (CONV_BACK, 'first input channel alone', loop('k', '1')),
    (CONV_BACK, 'without the last row and column of the window') + tuple(WINDOW),

    (POOL, 'starts from 0', ('largest, index = inputs[n, c, h * stride, w * stride], 0', 'largest, index = 0, 0')),
    (POOL, 'without the stride', ('h * stride, w * stride]', 'h, w]'), (TAKEN, 'inputs[n, c, h + i, w + j]')),
    (POOL, 'stride for rows alone', ('h * stride, w * stride]', 'h * stride, w]'),
     (TAKEN, 'inputs[n, c, h * stride + i, w + j]')),
    (POOL, 'stride for columns alone', ('h * stride, w * stride]', 'h, w * stride]'),
     (TAKEN, 'inputs[n, c, h + i, w * stride + j]')),
    (POOL, 'h and w exchanged', ('outputs[n, c, h, w] = largest', 'outputs[n, c, w, h] = largest')),
    (POOL, 'the minimum', ('x > largest', 'x < largest')),
    (POOL, 'the mean', ('outputs[n, c, h, w] = largest', 'outputs[n, c, h, w] = inputs[n, c, h * stride:h * stride + '
                        'kernel_size, w * stride:w * stride + kernel_size].mean()')),
    (POOL, 'largest magnitude', ('x = ' + TAKEN, 'x = abs(%s)' % TAKEN), ('= inputs[n, c, h * stride, w', (
        '= 0 * inputs[n, c, h * stride, w'))),
    (POOL, 'first number of each window', ('x > largest', 'x != x')),
    (POOL, 'last number of each window', ('x > largest', 'x == x')),
    (POOL, 'without the last row and column of the window') + tuple(WINDOW),
    (POOL, 'first image for all', (' x = inputs[n,', ' x = inputs[0,'),
     ('= inputs[n, c, h * stride, w', '= inputs[0, c, h * stride, w')),
    (POOL, 'first channel for all', (' x = inputs[n, c,', ' x = inputs[n, 0,'),
     ('= inputs[n, c, h * stride, w', '= inputs[n, 0, h * stride, w')),

    (POOL_BACK, 'read as j * K + i', ('i * kernel_size + j', 'j * kernel_size + i')),
    (POOL_BACK, 'one too large', (NOTED, 'argidx[n, c, h, w] = (index + 1) % kernel_size**2')),
    (POOL_BACK, 'one too small', (NOTED, 'argidx[n, c, h, w] = (index - 1) % kernel_size**2')),
    (POOL_BACK, 'starts from 0', ('largest, index = inputs[n, c, h * stride, w * stride], 0', 'largest, index = 0, 0')),
    (POOL_BACK, 'last of equal', ('x > largest', 'x >= largest')),
    (POOL_BACK, 'first number of each window', (NOTED, 'argidx[n, c, h, w] = 0')),
    (POOL_BACK, 'last number of each window', (NOTED, 'argidx[n, c, h, w] = i * kernel_size + j')),
    (POOL_BACK, '= for += where', (BACK, BACK.replace('+=', '='))),
    (POOL_BACK, 'without the stride', (BACK, BACK.replace(' * stride', ''))),
    (POOL_BACK, 'stride for rows alone', (BACK, BACK.replace('w * stride', 'w'))),
    (POOL_BACK, 'stride for columns alone', (BACK, BACK.replace('h * stride', 'h'))),
    (POOL_BACK, 'h and w exchanged', (BACK, BACK.replace('out_grad[n, c, h, w]', 'out_grad[n, c, w, h]'))),
    (POOL_BACK, 'for all of the window', (BACK, SPREAD)),
    (POOL_BACK, 'shared by all', (BACK, SPREAD + ' / kernel_size**2')),
    (POOL_BACK, 'maximum itself', ('    _, argidx = pool', '    c.g, argidx = pool')),
    (POOL_BACK, "first image's index", ('i, j = argidx[n, c, h, w] // kernel_size, argidx[n, c, h, w] %', (
        'i, j = argidx[0, c, h, w] // kernel_size, argidx[0, c, h, w] %'))),
    (POOL_BACK, "first channel's index", ('i, j = argidx[n, c, h, w] // kernel_size, argidx[n, c, h, w] %', (
        'i, j = argidx[n, 0, h, w] // kernel_size, argidx[n, 0, h, w] %'))),

    (RELU, 'left as they are', ('np.where(c.x > 0, c.x, 0)', 'c.x')),
    (RELU, 'the magnitude', ('c.x, 0)', 'c.x, -c.x)')),
    (RELU, 'the minimum', ('c.x > 0', 'c.x < 0')),
    (RELU, 'leaky', ('c.x, 0)', 'c.x, 0.01 * c.x)')),
    (RELU, 'ones for positive', ('c.x, 0)', '1, 0)')),
    (RELU_BACK, 'passed everywhere', ('np.where(c.x > 0, c.g, 0)', 'c.g')),
    (RELU_BACK, 'sign of the gradient', ('c.x > 0', 'c.g > 0')),
    (RELU_BACK, 'where the inputs are negative', ('c.x > 0', 'c.x < 0')),
    (RELU_BACK, 'gradient times the inputs', ('c.g, 0)', 'c.g * c.x, 0)')),
    (RELU_BACK, 'leaky', ('c.g, 0)', 'c.g, 0.01 * c.g)')),
    (RELU_BACK, 'ones for the gradient', ('c.g, 0)', '1, 0)')),
    (FLATTEN, 'h and w exchanged', ('c.x.reshape', 'c.x.transpose(0, 1, 3, 2).reshape')),
    (FLATTEN, 'channels last', ('c.x.reshape', 'c.x.transpose(0, 2, 3, 1).reshape')),
    (FLATTEN, 'reverse order', ('H * W))', 'H * W), order="F")')),
    (FLATTEN, 'images flattened', ('(N, C * H * W)', '-1')),
    (FLATTEN_BACK, 'left flat', ('.reshape((N, C, H, W))', '')),
    (FLATTEN_BACK, 'h and w exchanged', ('((N, C, H, W))', '((N, C, W, H)).transpose(0, 1, 3, 2)')),
    (FLATTEN_BACK, 'channels last', ('((N, C, H, W))', '((N, H, W, C)).transpose(0, 3, 1, 2)')),
    (FLATTEN_BACK, 'reverse order', ('((N, C, H, W))', '((N, C, H, W), order="F")')),
    (FULL, 'without the bias', ('y = bias[o]', 'y = 0')),
    (FULL, 'weight transposed', ('weight[o, i]', 'weight[i, o]')),
    (FULL, 'the last product is left', ('y += ', 'y = ')),
    (FULL, 'the last product and the bias', ('y += ', 'y = bias[o] + ')),
    (FULL, 'first image for all', ('inputs[n, i]', 'inputs[0, i]')),
    (FULL, 'ReLU', ('outputs[n, o] = y', 'outputs[n, o] = max(y, 0)')),
    (FULL_BACK, 'weight transposed', ('weight[o, i]', 'weight[i, o]')),
    (FULL_BACK, 'the last product is left', ('+=', '=')),
    (FULL_BACK, 'first image for all', ('out_grad[n, o]', 'out_grad[0, o]')),
    (LOSS, 'sum over the images', ('.mean()', '.sum()')),
    (LOSS, 'sign turned', ('-np.log', 'np.log')),
    (LOSS, 'base 2', ('np.log', 'np.log2')),
    (LOSS, 'base 10', ('np.log', 'np.log10')),
    (LOSS, 'without the logarithm', ('np.log', '')),
    (LOSS, 'without the softmax', ('np.log(p', '(c.x')),
    (LOSS, 'over the classes', ('.mean()', '.mean() / x.shape[1]')),
    (LOSS, 'overflows', (SOFTMAX, 'x = c.x')),
    (LOSS_BACK, 'number of images', ('grad / len(x)', 'grad')),
    (LOSS_BACK, 'without 1 taken off', ('-= 1', '-= 0')),
    (LOSS_BACK, 'sign turned', ('grad / len', '-grad / len')),
    (LOSS_BACK, 'number of classes', ('grad / len(x)', 'grad / grad.size')),
    (LOSS_BACK, 'logits for the softmax', ('grad = np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)',
                                           'grad = c.x.copy()')),
    (LOSS_BACK, 'overflows', (SOFTMAX, 'x = c.x')),
]
for kind in CONV, CONV_BACK, POOL, POOL_BACK:
    MUTANTS += [(kind, 'for the first %s alone, as after a return' % part, returning(name))
                for part, name in (('image', 'n'), ('channel', 'c'), ('row', 'h'), ('number', 'w'))]
    MUTANTS += [(kind, 'for the first %s of each' % part, loop(name, '1'))
                for part, name in (('channel', 'c'), ('row', 'h'), ('column', 'w'))]
    MUTANTS += [(kind, 'without the last %s, as of a loop' % part, loop(name, 'N - 1'))
                for part, name in (('channel', 'c'), ('row', 'h'), ('column', 'w'))]
    MUTANTS += [(kind, 'without the last row and column, as', loop('h', 'N - 1'), loop('w', 'N - 1'))]


def cases(kind):
    """Layers at work: as small_mistake of grade_judge.py makes them, and tiny ones; the loss, also of large logits."""
    rng = np.random.RandomState(7)
    if kind == 'CrossEntropy':
        return [SimpleNamespace(kind=kind, x=near + rng.randn(2, 4), labels=np.array([2, 0])) for near in (0, 1000)]
    network = [('ConvolutionLayer', (3, 3, 3, 1, 1), (1, 3, 6, 6)), ('MaxPoolLayer', (2, 2), (1, 3, 6, 6)),
               ('FullyConnectLayer', (5, 5), (1, 5))]
    found = [mistakes.case(*made + (rng,)) for made in network + mistakes.TINY if made[0] == kind]
    if kind == 'MaxPoolLayer':
        found[0].x = abs(found[0].x)
        found.append(mistakes.case(kind, (2, 2), (2, 3, 6, 6), rng))
        found[-1].x = np.round(found[-1].x)
    return found


def student(kind, *changes):
    """What a student wrote: a layer around the textbook's loops, with some changes."""
    loops, backward = LOOPS.get(kind[0]), kind[1] == 'backward'
    names = [loops + '_back'] * backward + [loops] * (not backward or loops == 'pool') if loops else []
    sources = [inspect.getsource(getattr(textbook, name).py_func).replace('@formula\n', '') for name in names]
    for change in changes:
        if callable(change):
            sources[0] = change(sources[0])
    source = ''.join(sources) + LAYERS[kind]
    for old, new in (change for change in changes if not callable(change)):
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    names = {'np': np}
    exec(source, names)
    return names['run']


def outcome(run, c):
    try:
        with np.errstate(all='ignore'):
            return run(SimpleNamespace(**vars(c)))
    except (IndexError, ValueError):    # a change that leads past an array of this shape
        return None


@pytest.mark.parametrize('kind', LAYERS)
def test_right_loops_match_no_mistake(kind):
    """The formulas are the textbook's, and rounding to float32 is no mistake."""
    for c in cases(kind[0]):
        found = student(kind)(c)
        assert mistakes.near(found, mistakes.right(c, kind[1]), 1e-6)
        assert mistakes.explain(c, kind[1], np.float32(found)) is None


@pytest.mark.parametrize('mutant', MUTANTS, ids=lambda mutant: '%s %s: %s' % (mutant[0] + mutant[1:2]))
def test_named(mutant):
    kind, words, changes = mutant[0], mutant[1], mutant[2:]
    run, explained = student(kind, *changes), []
    for c in cases(kind[0]):
        found = outcome(run, c)
        if found is not None:
            explained.append(mistakes.explain(c, kind[1], found))
    assert any(words in str(explanation) for explanation in explained), explained


def test_every_mistake_is_tried():
    for kind, known in mistakes.MISTAKES.items():
        for words, _ in known:
            assert any(mutant[0] == kind and mutant[1] in words for mutant in MUTANTS), (kind, words)
    for words, _ in mistakes.IN_PART:
        assert any(mutant[1] in words for mutant in MUTANTS), words
