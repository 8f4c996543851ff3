"""The steps of the rubric: `pytest -m stage60 tests`, then stage80, then stage100.

stage60   the network of vgg.py is built, and its parameters load
stage80   the layers' forward passes are right, and what main.py prints on the way forward
stage100  the layers' backward passes are right, and what main.py prints on the way back

A failure names the layer, the direction and the first number that is wrong.  What is expected is computed by scipy, or
follows from what the layer was given; main.py's lines are compared with file/expected_output.txt by tests/compare.py.
"""
import contextlib
import io
import os
import traceback

import numpy as np
import pytest
from scipy.ndimage import maximum_filter
from scipy.signal import convolve, correlate

import compare
import main
from layer import ConvolutionLayer, FlattenLayer, FullyConnectLayer, MaxPoolLayer, ReluLayer
from unwritten import BODIES, PROJECT, unwritten

stage60, stage80, stage100 = pytest.mark.stage60, pytest.mark.stage80, pytest.mark.stage100

KINDS = (('conv', ConvolutionLayer), ('relu', ReluLayer), ('maxpool', MaxPoolLayer), ('flatten', FlattenLayer),
         ('fullyconnect', FullyConnectLayer))
NAMES = ['layer%d_%s' % (stage, part) for stage in range(1, 6)
         for part in ['conv1', 'relu1', 'conv2', 'relu2'] + ['conv3', 'relu3'] * (stage > 2) + ['maxpool']]
NAMES += ['flatten', 'fullyconnect1', 'relu1', 'fullyconnect2', 'relu2', 'fullyconnect3']

# The plain case first, an empty batch last.
CONVOLUTIONS = [dict(batch=1, planes=(1, 1), size=(3, 3), K=2, P=0, S=1),
                dict(batch=1, planes=(1, 1), size=(4, 4), K=3, P=1, S=1),
                dict(batch=1, planes=(3, 1), size=(5, 5), K=3, P=1, S=1),
                dict(batch=1, planes=(1, 3), size=(5, 5), K=3, P=1, S=1),
                dict(batch=1, planes=(2, 3), size=(4, 7), K=3, P=1, S=1),
                dict(batch=2, planes=(2, 3), size=(5, 4), K=3, P=1, S=1),
                dict(batch=2, planes=(2, 3), size=(7, 6), K=3, P=1, S=2),
                dict(batch=2, planes=(2, 2), size=(8, 9), K=2, P=0, S=3),
                dict(batch=1, planes=(2, 2), size=(6, 5), K=1, P=2, S=2),
                dict(batch=1, planes=(2, 2), size=(9, 7), K=5, P=2, S=1),
                dict(batch=0, planes=(2, 3), size=(4, 4), K=3, P=1, S=1)]
POOLINGS = [dict(batch=1, planes=1, size=(4, 4), K=2, S=2),
            dict(batch=2, planes=3, size=(4, 6), K=2, S=2),
            dict(batch=2, planes=2, size=(7, 5), K=2, S=2),
            dict(batch=2, planes=2, size=(6, 7), K=3, S=2),
            dict(batch=1, planes=2, size=(5, 6), K=3, S=1),
            dict(batch=1, planes=2, size=(8, 7), K=2, S=3),
            dict(batch=0, planes=2, size=(4, 4), K=2, S=2)]


def words(case):
    """How a case is called."""
    return '%s, window %d%s, stride %d' % (
        'batch %(batch)d, planes %(planes)s of %(size)s' % case, case['K'],
        ', padding %d' % case['P'] if 'P' in case else '', case['S'])


def numbers(*shape):
    return np.random.RandomState(sum(shape)).randint(-8, 9, shape).astype(np.float32)


def needs(body):
    """Skip what cannot be right yet; that `body` is missing is said once, by the test of it."""
    if body in unwritten():
        pytest.skip('%s.%s is not written yet' % (BODIES[body][0], body))


def do(layer, direction, given, case):
    """layer.forward or layer.backward of a copy."""
    try:
        return getattr(layer, direction)(given.copy())
    except IndexError:    # compiled loops do not say where, the same as plain Python do
        for body in BODIES:
            if hasattr(layer, body):
                setattr(layer, body, getattr(getattr(layer, body), 'py_func', getattr(layer, body)))
        try:
            return getattr(layer, direction)(given.copy())
        except IndexError as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            pytest.fail('%s.%s of %s: %s line %d, `%s`: IndexError: %s' % (
                type(layer).__name__, direction, case, os.path.basename(place.filename), place.lineno, place.line,
                error), pytrace=False)


def check(layer, direction, case, found, expected):
    """Fail in a line: the kind of result first, its shape, then its first wrong number."""
    expected = np.asarray(expected)
    what = '%s.%s of %s: ' % (type(layer).__name__, direction, case)
    if not isinstance(found, np.ndarray):
        pytest.fail(what + 'returns %s, not an array' % type(found).__name__, pytrace=False)
    if found.shape != expected.shape:
        pytest.fail(what + 'shape %s expected, found %s' % (expected.shape, found.shape), pytrace=False)
    wrong = np.argwhere(~(np.abs(found - expected) <= 1e-5 * np.abs(expected).max(initial=1)))
    if len(wrong):
        place = tuple(map(int, wrong[0]))
        pytest.fail(what + 'first wrong at index %s: expected %.7g, found %.7g (%d of %d numbers are wrong)' % (
            place, expected[place], found[place], len(wrong), expected.size), pytrace=False)


def convolution(case):
    """A layer, its input, the input with its padding."""
    (ins, outs), K, P = case['planes'], case['K'], case['P']
    layer = ConvolutionLayer(ins, outs, K, padding=P, stride=case['S'])
    layer.load_params(numbers(outs, ins, K, K), numbers(outs))
    inputs = numbers(case['batch'], ins, *case['size'])
    return layer, inputs, np.pad(inputs, ((0, 0), (0, 0), (P, P), (P, P)), mode='constant')


def pooling(case):
    """A layer, and an input in which all numbers differ and none is positive."""
    shape = (case['batch'], case['planes']) + case['size']
    inputs = -np.random.RandomState(1).permutation(int(np.prod(shape)))
    return MaxPoolLayer(case['K'], case['S']), inputs.reshape(shape).astype(np.float32)


def positions(size, case):
    """Height and width of the outputs for planes, padding included, of a height and width."""
    return tuple((side - case['K']) // case['S'] + 1 for side in size)


def maxima(inputs, case):
    """The largest numbers of the windows that begin at each place, those that are S apart."""
    (height, width), K, S = case['size'], case['K'], case['S']
    found = maximum_filter(inputs, (1, 1, K, K), origin=(0, 0, -(K // 2), -(K // 2)))
    return found[:, :, :height - K + 1:S, :width - K + 1:S]


# ---------------------------------------------------------------------------------------------------- stage60

@pytest.fixture(scope='module')
def built():
    """VGG16 as vgg.py builds it, or the error."""
    try:
        return main.VGG16(4)
    except Exception as error:
        return error


@pytest.fixture(scope='module')
def network(built):
    """The network, where it is built."""
    if isinstance(built, Exception):
        pytest.skip('the network is not built yet')
    return built


@pytest.fixture(scope='module')
def loaded(network):
    """(the network with the checkpoint's parameters, the checkpoint, what was printed)."""
    printed, checkpoint = io.StringIO(), main.load_checkpoint()
    with contextlib.redirect_stdout(printed):
        try:
            network.resume_weights(checkpoint)
        except (AssertionError, AttributeError, KeyError, TypeError) as error:
            pytest.fail(main.misfit(network) or 'resume_weights: %s: %s' % (type(error).__name__, error), pytrace=False)
    return network, checkpoint, printed.getvalue()


@stage60
def test_the_network_is_built(built):
    if isinstance(built, AttributeError) and main.not_made(built):
        pytest.fail(main.not_made(built), pytrace=False)
    if isinstance(built, Exception):
        raise built
    assert list(built.graph_layers) == NAMES, 'graph_layers: other names, or another order, than the handbook has'
    for name, layer in built.graph_layers.items():
        kind = next(kind for word, kind in KINDS if word in name)
        assert isinstance(layer, kind), '%s is a %s: %s expected' % (name, type(layer).__name__, kind.__name__)
    assert len(set(map(id, built.graph_layers.values()))) == len(NAMES), 'a layer is there twice, under two names'


@stage60
def test_windows_are_the_tables(network):
    """As far as a layer tells: convolutions of 3 x 3 with a padding of 1, poolings of 2 x 2, two apart."""
    for name, layer in network.graph_layers.items():
        wanted = {'kernel_size': 3, 'padding': 1, 'stride': 1} if 'conv' in name else {
            'kernel_size': 2, 'stride': 2} if 'maxpool' in name else {}
        for key, size in wanted.items():
            found = getattr(layer, key, size)
            assert found == size, '%s: %s is %s, %d expected' % (name, key, found, size)


@stage60
def test_every_parameter_is_in_place(loaded):
    model, checkpoint, printed = loaded
    for name, parameters in checkpoint.items():
        for key, wanted in parameters.items():
            found = getattr(model.graph_layers[name], key)
            assert found.shape == wanted.shape, '%s.%s: shape %s expected, found %s' % (
                name, key, wanted.shape, found.shape)
            assert np.array_equal(found, wanted), '%s.%s: other numbers than in the checkpoint' % (name, key)
    assert printed == 'reloaded success\n' * 16


# ---------------------------------------------------------------------------------------------------- stage80

@pytest.mark.parametrize('body', [pytest.param(body, marks=stage100 if body.endswith('back') else stage80)
                                  for body in sorted(BODIES)])
def test_it_is_written(body):
    if body in unwritten():
        pytest.fail(unwritten()[body], pytrace=False)


@stage80
@pytest.mark.parametrize('case', CONVOLUTIONS, ids=words)
def test_convolution_forward(case):
    needs('_conv')
    layer, inputs, inputs_pad = convolution(case)
    S, weight, bias = case['S'], layer.weight.copy(), layer.bias.copy()
    found = do(layer, 'forward', inputs, words(case))
    expected = np.zeros((case['batch'], case['planes'][1]) + positions(inputs_pad.shape[2:], case))
    for n, picture in enumerate(inputs_pad):
        for c in range(len(weight)):
            expected[n, c] = bias[c] + correlate(picture, weight[c], mode='valid', method='direct')[0, ::S, ::S]
    check(layer, 'forward', words(case), found, expected)


@stage80
@pytest.mark.parametrize('case', POOLINGS, ids=words)
def test_pooling_forward(case):
    needs('_pool')
    layer, inputs = pooling(case)
    check(layer, 'forward', words(case), do(layer, 'forward', inputs, words(case)), maxima(inputs, case))


@stage80
def test_relu_forward():
    inputs, layer = numbers(2, 3, 4, 5), ReluLayer()
    check(layer, 'forward', 'numbers of either sign', do(layer, 'forward', inputs, ''), np.maximum(inputs, 0))


@stage80
def test_flatten_forward():
    inputs, layer = numbers(2, 3, 4, 5), FlattenLayer()
    check(layer, 'forward', 'planes (2, 3, 4, 5)', do(layer, 'forward', inputs, ''), inputs.reshape(2, 60))


@stage80
def test_fully_connected_forward():
    layer, inputs, weight, bias = FullyConnectLayer(5, 3), numbers(2, 5), numbers(3, 5), numbers(3)
    layer.load_params(weight.copy(), bias.copy())
    check(layer, 'forward', 'rows (2, 5)', do(layer, 'forward', inputs, ''), inputs @ weight.T + bias)


def probabilities(logits):
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


@stage80
def test_loss_forward():
    logits, labels = numbers(3, 4), np.array([1, 0, 3])
    expected = -np.log(probabilities(logits)[range(3), labels]).mean()
    found = main.CrossEntropy().forward(logits.copy(), labels)
    assert abs(found - expected) <= 1e-5 * expected, 'CrossEntropy.forward: expected %g, found %g' % (expected, found)


def check_run(demo_run, direction):
    """The lines of a direction, as compare.py compares them."""
    status, out, err = demo_run
    path = os.path.join(PROJECT, 'file', 'expected_output.txt')
    rows = compare.compare(compare.parse(path), compare.lines_of(out), compare.magnitudes_of(path, None))
    wrong = [row for row in rows if row['direction'] == direction and not compare.agrees(row)]
    if wrong:
        lines = [compare.diagnosis(rows, direction)] + list(compare.table(wrong[:3])) + err.splitlines()[-3:]
        pytest.fail('main.py: ' + '\n'.join(lines), pytrace=False)
    return out


@stage80
def test_what_main_prints_forward(network, demo_run):
    needs('_conv')
    needs('_pool')
    out = check_run(demo_run, 'forward')
    assert out.splitlines()[:16] == ['reloaded success'] * 16
    assert 'tulips' in out.splitlines()


# --------------------------------------------------------------------------------------------------- stage100

def gradient(shape):
    return numbers(*shape).astype(np.float64)


@stage100
@pytest.mark.parametrize('case', CONVOLUTIONS, ids=words)
def test_convolution_backward(case):
    needs('_conv')
    needs('_conv_back')
    layer, inputs, inputs_pad = convolution(case)
    S, P, weight = case['S'], case['P'], layer.weight.copy()
    do(layer, 'forward', inputs, words(case))
    out_grad = gradient((case['batch'], case['planes'][1]) + positions(inputs_pad.shape[2:], case))
    expected = np.zeros(inputs_pad.shape)
    apart = np.zeros(out_grad.shape[:2] + tuple((side - 1) * S + 1 for side in out_grad.shape[2:]))
    apart[:, :, ::S, ::S] = out_grad    # zeros in between, where the window moves by more than one
    for n, grads in enumerate(apart):
        for k in range(inputs.shape[1]):
            full = sum(convolve(grad, window, method='direct') for grad, window in zip(grads, weight[:, k]))
            expected[n, k, :full.shape[0], :full.shape[1]] = full
    found = do(layer, 'backward', out_grad, words(case))
    check(layer, 'backward', words(case), found, expected[:, :, P:P + case['size'][0], P:P + case['size'][1]])


@stage100
@pytest.mark.parametrize('case', POOLINGS, ids=words)
def test_pooling_backward(case):
    """No number is there twice, so that a maximum tells which number it was."""
    needs('_pool')
    needs('_pool_back')
    layer, inputs = pooling(case)
    do(layer, 'forward', inputs, words(case))
    outputs = maxima(inputs, case)
    out_grad = gradient(outputs.shape)
    expected = [out_grad[outputs == number].sum() for number in inputs.flat]
    found = do(layer, 'backward', out_grad, words(case))
    check(layer, 'backward', words(case), found, np.reshape(expected, inputs.shape))


@stage100
def test_relu_backward():
    layer, inputs, out_grad = ReluLayer(), numbers(2, 3, 4, 5) + 0.5, gradient((2, 3, 4, 5))
    do(layer, 'forward', inputs, '')
    check(layer, 'backward', 'numbers of either sign', do(layer, 'backward', out_grad, ''),
          np.where(inputs > 0, out_grad, 0))


@stage100
def test_flatten_backward():
    layer, out_grad = FlattenLayer(), gradient((2, 60))
    do(layer, 'forward', numbers(2, 3, 4, 5), '')
    check(layer, 'backward', 'planes (2, 3, 4, 5)', do(layer, 'backward', out_grad, ''), out_grad.reshape(2, 3, 4, 5))


@stage100
def test_fully_connected_backward():
    layer, weight, out_grad = FullyConnectLayer(5, 3), numbers(3, 5), gradient((2, 3))
    layer.load_params(weight.copy(), numbers(3))
    do(layer, 'forward', numbers(2, 5), '')
    check(layer, 'backward', 'rows (2, 5)', do(layer, 'backward', out_grad, ''), out_grad @ weight)


@stage100
def test_loss_backward():
    loss, logits, labels = main.CrossEntropy(), numbers(3, 4), np.array([1, 0, 3])
    loss.forward(logits.copy(), labels)
    check(loss, 'backward', 'logits (3, 4)', loss.backward(), (probabilities(logits) - np.eye(4)[labels]) / 3)


@stage100
def test_what_main_prints_backward(network, demo_run):
    for body in BODIES:
        needs(body)
    check_run(demo_run, 'backward')
    assert demo_run[0] == 0, demo_run[2]
