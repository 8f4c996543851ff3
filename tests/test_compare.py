"""Transcripts that agree and transcripts with one mistake: verdict, layer to blame, exit status."""
import json
import os
import random

import pytest

import compare

LAYERS = ['layer%d_%s' % (stage, part) for stage in range(1, 6)
          for part in ['conv1', 'relu1', 'conv2', 'relu2'] + ['conv3', 'relu3'] * (stage > 2) + ['maxpool']]
LAYERS += ['flatten', 'fullyconnect1', 'relu1', 'fullyconnect2', 'relu2', 'fullyconnect3']


def transcript(changes=(), after=None):
    """Lines like main.py's; changes multiply (mean, sum) of {(direction, name)}; from after on, all are wrong."""
    rng, lines = random.Random(5), ['reloaded success'] * 16
    factor = 1
    for direction in ('forward', 'backward'):
        for name in LAYERS if direction == 'forward' else reversed(LAYERS):
            factor = 1.05 if (direction, name) == after else factor
            total = rng.uniform(-1000, 1000) * factor * dict(changes).get((direction, name), 1)
            if (direction, name) == ('backward', 'fullyconnect3'):
                total = 1.1102230246251565e-16 * factor
            lines.append('%s: %s: %r %r' % (direction, name, total / 1000, total))
        if direction == 'forward':
            lines += ['[[ %.6f -1.5 0.25  3.125]]' % (7 * factor), 'tulips', '9.5']
    return lines + ['%r %r' % (1e-5 * factor, 1.5 * factor), '4.75']


@pytest.fixture
def files(tmp_path):
    """Write lines into a file."""
    def write(name, lines, end='\n', last=True, encoding='utf-8'):
        path = tmp_path / name
        path.write_bytes((end.join(lines) + (end if last else '')).encode(encoding))
        return str(path)
    return write


def run(capsys, *arguments):
    status = compare.main(list(arguments))
    out, err = capsys.readouterr()
    return status, out, err


def test_layers_are_the_networks():
    assert len(LAYERS) == 37
    assert all(compare.cause(direction, name) for direction in ('forward', 'backward') for name in LAYERS)


@pytest.mark.parametrize('form', [dict(), dict(end='\r\n'), dict(last=False), dict(end='\r\n', encoding='utf-16'),
                                  dict(encoding='utf-8-sig')])
def test_form_does_no_harm(files, capsys, form):
    noisy = transcript()[5:]
    noisy[20:20] = ['', 'loading ...', 'NumbaWarning: 3.5 [[', '  0.5 s']
    noisy[70:70] = ['debug 1.0', '花']
    if form.get('encoding') == 'utf-8-sig':
        noisy = transcript()
    status, out, _ = run(capsys, files('expected', transcript()), files('actual', noisy, **form))
    assert (status, out.split('\n')[-2]) == (0, 'all 78 lines agree'), out
    assert out.count(' same\n') == 78


def test_noise_agrees_and_says_so(files, capsys):
    noise = {('forward', 'layer3_conv2'): 1 + 3e-5, ('backward', 'layer2_relu2'): 1 - 4e-3}
    status, out, _ = run(capsys, files('expected', transcript()), files('actual', transcript(noise)))
    assert (status, out.split('\n')[-2]) == (0, 'all 78 lines agree, 2 of them within the tolerance for float32 noise')


def test_a_sum_that_cancels_agrees(files, capsys):
    other = [line.replace('1.1102230246251565e-16', '-3.2e-09').replace('1.1102230246251565e-19', '-8e-10')
             for line in transcript()]
    assert other != transcript()
    assert run(capsys, files('expected', transcript()), files('actual', other))[0] == 0
    wrong = [line.replace('1.1102230246251565e-16', '0.001') for line in transcript()]
    assert run(capsys, files('expected', transcript()), files('actual', wrong))[0] == 1


@pytest.mark.parametrize('factor, status', [(1 + 1e-3, 0), (1 + 1e-1, 1)])
def test_magnitudes_loosen_a_sum_that_cancels(files, capsys, factor, status):
    """A sum of 1000 that numbers of 1e5 make up may be off by 5e-5 of them, and no more."""
    key = ('backward', 'layer4_conv1')
    line = next(line for line in transcript() if line.startswith('backward: layer4_conv1'))
    magnitude = abs(float(line.split()[-1])) * 1e2
    tensors = files('tensors', ['%-8s  %-14s  float64  1x256x28x28    %.4e  0123456789abcdef' % (key + (magnitude,))])
    expected = files('expected', transcript())
    assert run(capsys, expected, files('actual', transcript({key: factor})), '--tensors', tensors)[0] == status


def test_magnitudes_tighten_a_sum_that_does_not(files, capsys):
    key = ('forward', 'layer2_relu1')
    magnitude = 1000
    tensors = ['forward   layer2_relu1    float32  1x128x112x112  %.4e  0123456789abcdef' % magnitude]
    expected, actual = files('expected_output.txt', transcript()), files('actual', transcript({key: 1 + 9e-5}))
    assert run(capsys, expected, actual)[0] == 0
    files('expected_tensors.txt', tensors)    # found beside an expected_output.txt
    assert run(capsys, expected, actual)[0] == 1


@pytest.mark.parametrize('after, layer, words', [
    (('forward', 'layer1_conv1'), None, 'already the first line differs: picture decoding or preprocessing'),
    (('forward', 'layer1_relu1'), 'layer1_conv1', 'padding'),
    (('forward', 'layer2_conv1'), 'layer1_maxpool', 'window'),
    (('forward', 'fullyconnect2'), 'relu1', 'max(0, x)'),
    (('backward', 'fullyconnect3'), None, 'already the first line differs: CrossEntropy'),
    (('backward', 'layer5_relu3'), 'flatten or layer5_maxpool', 'argmax index'),
    (('backward', 'layer5_conv3'), 'layer5_maxpool or layer5_relu3', 'argmax index'),
    (('forward', 'relu1'), 'flatten or fullyconnect1', 'row-major'),
    (('backward', 'layer3_relu1'), 'layer3_conv2', '+= not ='),
])
def test_first_wrong_layer_is_named(files, capsys, after, layer, words):
    other = transcript(after=after)
    if after == ('backward', 'fullyconnect3'):
        other = [line.replace('1.1657341758564144e-16', '0.5') for line in other]
    status, out, _ = run(capsys, files('expected', transcript()), files('actual', other))
    found = [line for line in out.split('\n') if line.startswith(after[0] + ': ')]
    assert status == 1 and len(found) == 1 and words in found[0]
    if layer:
        assert found[0].startswith('%s: %s went wrong first' % (after[0], layer))
    assert ('mend that first' in out) == (after[0] == 'forward')


@pytest.mark.parametrize('old, new, words', [
    ('tulips', 'roses', 'not the class'), ('9.5', '9.6', 'not the loss'),
    ('[[ 7.000000', '[[ 7.100000', 'fullyconnect3 went wrong first'),
    ('1e-05 1.5', '1e-05 1.6', 'layer1_conv1 went wrong'),
    ('1e-05 1.5', 'nan nan', 'layer1_conv1 went wrong'),
])
def test_lines_that_are_no_layers(files, capsys, old, new, words):
    other = [line.replace(old, new) if line.startswith(old) else line for line in transcript()]
    status, out, _ = run(capsys, files('expected', transcript()), files('actual', other))
    assert status == 1 and words in out


@pytest.mark.parametrize('old, new, name', [
    ('[[ 7.000000 -1.5 0.25  3.125]]', '[[7.0, -1.5, 0.25, 3.125]]', 'logits'),
    ('[[ 7.000000 -1.5 0.25  3.125]]', 'tensor([[ 7.0, -1.5,\n 0.25, 3.125]], dtype=float32)', 'logits'),
    ('tulips', 'class: tulips', 'class'), ('tulips', "pred = 'tulips'", 'class'),
    ('9.5', 'loss: 9.5', 'loss'), ('9.5', 'loss 9.5', 'loss'),
    (transcript()[21], 'forward: %s: 0.5, 500.0' % LAYERS[5], LAYERS[5]),
    (transcript()[90], 'backward: %s: 0.5' % LAYERS[36 - 90 + 56], LAYERS[36 - 90 + 56]),
])
def test_a_line_of_another_form_is_said_to_be_one(files, capsys, old, new, name):
    other = [new if line == old else line for line in transcript()] + ['forward: here: debug']
    status, out, _ = run(capsys, files('expected', transcript()), files('actual', other))
    assert status == 1 and 'the line of %s has another form' % name in out, out
    assert out.count(' FORM\n') == 1 and out.count(' same\n') == 77 and 'ended' not in out


def test_a_run_that_ended_is_said_to_have_ended(files, capsys):
    """A traceback in its place is no class."""
    other = transcript()[:54] + ['Traceback (most recent call last):', '  File "main.py", line 3, in <module>',
                                 "IndexError: tuple index [1.5] out of range"]
    status, out, _ = run(capsys, files('expected', transcript()), files('actual', other))
    assert status == 1 and 'forward: class is missing: the run ended before it' in out, out


def test_a_missing_and_a_misplaced_layer(files, capsys):
    expected, other = files('expected', transcript()), transcript()
    status, out, _ = run(capsys, expected, files('cut', other[:30]))
    assert status == 1 and 'forward: %s is missing' % LAYERS[30 - 16] in out
    other[20], other[21] = other[21], other[20]
    status, out, _ = run(capsys, expected, files('swapped', other))
    assert status == 1 and 'is not where it belongs' in out
    extra = transcript() + ['backward: layer0_conv1: 1.0 2.0']
    assert run(capsys, expected, files('extra', extra))[0] == 1


def test_json_has_null_for_what_is_no_number(files, capsys):
    for number in ('nan nan', 'inf -inf'):
        other = [line.replace('1e-05 1.5', number) for line in transcript()]
        _, out, _ = run(capsys, files('expected', transcript()), files('actual', other), '--json')
        found = json.loads(out, parse_constant=lambda constant: pytest.fail(constant))
        row = next(line for line in found['lines'] if line['name'] == 'picture')
        assert (row['verdict'], row['actual'], row['error']) == ('WRONG', [None, None], None)


def test_json(files, capsys):
    status, out, _ = run(capsys, files('expected', transcript()),
                         files('actual', transcript({('forward', 'layer4_relu2'): 2})), '--json')
    found = json.loads(out)
    assert status == 1 and found['agree'] is False
    assert [line['name'] for line in found['lines'] if line['verdict'] == 'WRONG'] == ['layer4_relu2']
    assert len(found['summary']) == 1 and 'layer4_conv2' in found['summary'][0]


def test_files_that_are_no_transcripts(files, capsys, tmp_path):
    good, empty = files('good', transcript()), files('empty', ['reloaded success'])
    for arguments, name in [((empty, good), empty), ((good, empty), empty), ((good, str(tmp_path / 'no')), 'no'),
                            ((good, str(tmp_path)), str(tmp_path)), ((good, good, '--tensors', good), good)]:
        status, out, err = run(capsys, *arguments)
        assert status == 2 and out == '' and err.startswith('compare.py: ') and name in err and err.count('\n') == 1


def test_what_the_package_prints_is_understood():
    """The shipped transcript, where it is there."""
    path = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'file', 'expected_output.txt')
    if not os.path.exists(path):
        pytest.skip('no expected_output.txt')
    rows = compare.compare(compare.parse(path), compare.parse(path), compare.magnitudes_of(path, None))
    assert len(rows) == 78 and {row['verdict'] for row in rows} == {'same'}
    assert len([row for row in rows if row['tolerance'] in (1e-5, 5e-5)]) >= 75
