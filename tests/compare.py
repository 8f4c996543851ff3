"""Compare what two runs of main.py printed, and name the layer that went wrong first.

    python tests/compare.py EXPECTED ACTUAL [--tensors FILE] [--json]

A line gives the mean and the sum of a tensor.  Rounding makes sums differ in proportion to the tensor's sum of
magnitudes, and not to the sum itself, which may cancel to nothing.  The magnitudes are read from FILE, where
tests/tensors.py was told to print them for the expected run (by default from expected_tensors.txt where EXPECTED is
an expected_output.txt beside it); without them sums are compared with themselves, ten times less strictly forward
and two hundred times backward.

The exit status is 0 if all lines agree, 1 if not, 2 if a file is no transcript.
"""
import argparse
import codecs
import json
import math
import os
import re
import sys
from collections import OrderedDict

# Measured with plain loops and with float64 in place of layer.py's float32: 5e-7 of the magnitude forward, 1.3e-5
# backward, where a near tie in one pooling window moves a gradient; relative to the sums 6e-7 and 4e-3.
TOLERANCE = {('forward', True): 1e-5, ('backward', True): 5e-5, ('forward', False): 1e-4, ('backward', False): 1e-2}

KINDS = ('conv', 'relu', 'maxpool', 'flatten', 'fullyconnect')
CAUSES = {
    ('forward', 'conv'): 'the padding (zeros all around each plane), the bias, or the order of the weight\'s indices: '
                         'output channel, input channel, row, column',
    ('forward', 'maxpool'): 'where a window starts and ends, or a maximum that starts from 0',
    ('forward', 'relu'): 'max(0, x), element by element',
    ('forward', 'flatten'): 'the order: (N, C, H, W) to (N, C * H * W), row-major',
    ('forward', 'fullyconnect'): 'the weight is (out, in): inputs times its transpose, plus the bias',
    ('backward', 'conv'): 'what an input gets from all the outputs that it took part in has to add up, += not =; or '
                          'the padding, which is cut off from the result',
    ('backward', 'maxpool'): 'the argmax index: argidx has to lead back to the element that was the maximum',
    ('backward', 'relu'): 'the gradient passes where the input was positive, and is 0 elsewhere',
    ('backward', 'flatten'): 'the shape of the inputs, which forward has to note',
    ('backward', 'fullyconnect'): 'the gradient of the inputs is out_grad times the weight, not its transpose',
}
# They only move numbers: moved to a wrong place, these keep their sum, and the line after the next layer tells it.
MOVERS = (('backward', 'maxpool'), ('forward', 'flatten'), ('backward', 'flatten'))
PREPROCESSING = ('picture decoding or preprocessing: another picture, another JPEG decoder, BGR for RGB, the resizing, '
                 'or the mean and deviation')
LOSS = 'CrossEntropy, or another label'
PRINTED = {'logits': '`outputs`', 'class': '`CLASSES[pred]`', 'loss': '`loss`'}


class TranscriptError(Exception):
    """A file that is no transcript; the text says which, and what to do."""


def kind_of(name):
    return next((kind for kind in KINDS if kind in name), None)


def cause(direction, name):
    """What usually makes a layer of that name go wrong."""
    return CAUSES[direction, kind_of(name)]


def text_of(path):
    """The text in a file, whatever a shell wrote: PowerShell's > makes UTF-16 of it."""
    try:
        with open(path, 'rb') as file:
            content = file.read()
    except OSError as error:
        raise TranscriptError('%s: cannot be read (%s)' % (path, error.strerror))
    encoding = 'utf-16' if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else 'utf-8-sig'
    return content.decode(encoding, errors='replace')


def numbers(text):
    """The list of floats that a text consists of, or None."""
    try:
        return [float(word) for word in text.split()] or None
    except ValueError:
        return None


def lines_of(text):
    """The lines of a transcript that count.

    Returns
    -------
    OrderedDict
        {(direction, name): values}: mean and sum before each layer, and forward the logits, the class and the loss,
        backward the mean and sum of the picture's gradient.  What has another form is the line's text.
    """
    lines = OrderedDict()
    for match in re.finditer(r'^[ \t]*(forward|backward): (\w+): (.+)$', text, re.MULTILINE):
        values = numbers(match.group(3))
        lines.setdefault(match.groups()[:2], values if values and len(values) == 2 else match.group(3))
    between = re.search(r'^[ \t]*forward: fullyconnect3: .+$((?:\n(?![ \t]*backward: ).*)*)', text, re.MULTILINE)
    if between:
        logits = re.search(r'\[+([^][]*)\]+', between.group(1))
        if logits:
            lines['forward', 'logits'] = numbers(logits.group(1)) or ' '.join(logits.group().split())
        for line in between.group(1)[logits.end() if logits else 0:].split('\n'):
            line = line.strip(' \t\r[]')
            values = numbers(line)
            if values and len(values) == 1:
                lines['forward', 'loss'] = values
            elif re.match(r'([\w ]+[:=])?\W*[^\W\d]+\W*$', line) and not values:
                lines.setdefault(('forward', 'class'), line)
            elif re.search(r'\d\.\d', line):
                lines.setdefault(('forward', 'loss'), line)
    if ('backward', 'layer1_conv1') in lines:
        pairs = [values for values in map(numbers, text[text.rfind('backward: '):].split('\n')[1:]) if values]
        lines.update([(('backward', 'picture'), values) for values in pairs if len(values) == 2][:1])
    return OrderedDict(sorted(lines.items(), key=lambda line: line[0][0] == 'backward'))


def parse(path):
    """The lines of a transcript that count, in a file."""
    lines = lines_of(text_of(path))
    if not any(isinstance(values, list) for values in lines.values()):
        raise TranscriptError('%s: has no line like `forward: layer1_conv1: MEAN SUM`: '
                              'give what main.py printed' % path)
    return lines


def magnitudes_of(expected, tensors):
    """{(direction, name): sum of magnitudes} from what tests/tensors.py printed, as far as it is there."""
    beside = os.path.join(os.path.dirname(expected), 'expected_tensors.txt')
    if tensors is None and os.path.basename(expected) == 'expected_output.txt' and os.path.exists(beside):
        tensors = beside
    if tensors is None:
        return {}
    rows = re.findall(r'^(forward|backward) +(\w+) +\w+ +[\dx]+ +([-+.\de]+) ', text_of(tensors), re.MULTILINE)
    if not rows:
        raise TranscriptError('%s: has no sums of magnitudes: give what tests/tensors.py printed' % tensors)
    return {(direction, name): float(magnitude) for direction, name, magnitude in rows}


def difference(expected, actual, magnitude):
    """Relative error of a line: of the logits relative to the largest, of mean and sum relative to the magnitude."""
    if expected == actual:
        return 0.0
    if isinstance(expected, str) or isinstance(actual, str) or len(expected) != len(actual):
        return math.inf
    if len(expected) == 2:
        mean, total = expected
        scales = [magnitude * abs(mean / total) if total else math.inf, magnitude]
    else:
        scales = [max(map(abs, expected))] * len(expected)
    errors = [abs(a - e) / scale if scale else math.inf for e, a, scale in zip(expected, actual, scales) if a != e]
    return math.inf if any(map(math.isnan, errors)) else max(errors)


def compare(lines, others, magnitudes):
    """A row for each line of an expected and an actual transcript (see parse).

    Returns
    -------
    list of dict
        direction, name, expected, actual, error, verdict: same, ok (within the tolerance), WRONG, FORM (it is
        there, but not as the handbook prints it), MISSING in ACTUAL, or MISPLACED, which is a layer that EXPECTED does
        not have or that did not run in its turn.
    """
    magnitudes = dict(magnitudes)
    if ('forward', 'loss') in lines:    # softmax minus one-hot, where the probability of the label is exp(-loss)
        magnitudes.setdefault(('backward', 'fullyconnect3'), max(0.01, 2 - 2 * math.exp(-lines['forward', 'loss'][0])))
    rows = []
    for key in lines:
        pair = isinstance(lines[key], list) and len(lines[key]) == 2
        magnitude = magnitudes.get(key, abs(lines[key][1]) if pair else None)
        row = {'direction': key[0], 'name': key[1], 'expected': lines[key], 'actual': others.get(key), 'error': None,
               'tolerance': TOLERANCE[key[0], key in magnitudes]}
        if key not in others:
            row['verdict'] = 'MISSING'
        elif isinstance(others[key], str) and (key[1] != 'class' or re.search(r'\W', others[key])):
            row['verdict'] = 'FORM'
        else:
            row['error'] = difference(lines[key], others[key], magnitude)
            row['verdict'] = 'same' if row['error'] == 0 else 'ok' if row['error'] <= row['tolerance'] else 'WRONG'
        rows.append(row)
    others = {key: values for key, values in others.items() if key in lines or not isinstance(values, str)}
    common = [key for key in lines if key in others]
    turns = iter(common)
    for key in others:
        if key not in lines or key != next(turns):
            rows.append({'direction': key[0], 'name': key[1], 'expected': lines.get(key), 'actual': others[key],
                         'error': None, 'tolerance': None, 'verdict': 'MISPLACED'})
            if key in lines:    # one layer out of its turn puts all that follow out of theirs
                break
    return rows


def agrees(row):
    return row['verdict'] in ('same', 'ok')


def diagnosis(rows, direction):
    """One sentence on where a direction went wrong first, or None.

    A forward line describes a layer's input, so that the layer to blame is the one of the line before.
    """
    mine = [row for row in rows if row['direction'] == direction]
    index = next((index for index, row in enumerate(mine) if not agrees(row)), None)
    if index is None:
        return None
    row = mine[index]
    if row['verdict'] in ('MISSING', 'MISPLACED'):
        return '%s: %s is %s' % (direction, row['name'], {
            'MISSING': 'missing: the run ended before it, or the layer is not in the graph',
            'MISPLACED': 'not where it belongs: compare the graph with the expected order'}[row['verdict']])
    if row['verdict'] == 'FORM':
        return '%s: the line of %s has another form, %r: print %s, as the handbook does' % (
            direction, row['name'], row['actual'], PRINTED.get(row['name'], 'mean and sum'))
    if row['name'] in ('class', 'loss'):
        return 'forward: all layers agree, but not the %s: %s' % (row['name'], {
            'class': 'it is CLASSES[np.argmax(outputs)]', 'loss': LOSS}[row['name']])
    if index == 0:
        return '%s: already the first line differs: %s' % (direction, PREPROCESSING if direction == 'forward' else LOSS)
    layer = mine[index - 1]['name']
    blamed, usual = layer, cause(direction, layer)
    before = mine[index - 2]['name'] if index > 1 else ''
    if (direction, kind_of(before)) in MOVERS:
        blamed, usual = '%s or %s' % (before, layer), '%s; or %s' % (cause(direction, before), usual)
    return '%s: %s went wrong first (line %s shows it); usually %s' % (direction, blamed, row['name'], usual)


def summary(rows):
    """The sentences below the table."""
    if all(map(agrees, rows)):
        noise = sum(row['verdict'] == 'ok' for row in rows)
        return ['all %d lines agree%s' % (
            len(rows), ', %d of them within the tolerance for float32 noise' % noise if noise else '')]
    forward, backward = diagnosis(rows, 'forward'), diagnosis(rows, 'backward')
    if forward and backward:
        backward = 'backward: differs too; it starts from the forward pass, so mend that first'
    return [line for line in (forward, backward) if line]


def table(rows):
    """The rows as lines of text."""
    def cells(values):
        if values is None or isinstance(values, str) or len(values) != 2:
            return [values or '-', ''] if values is None or isinstance(values, str) else [
                ' '.join('%.6g' % value for value in values), '']
        return ['%.8g' % value for value in values]

    layout = '%-8s  %-14s  %-15s %-15s  %-15s %-15s  %-8s %s'
    yield layout % ('', 'layer', 'expected mean', 'sum', 'actual mean', 'sum', 'error', 'verdict')
    for row in rows:
        error = '-' if row['error'] is None else '%.1e' % row['error']
        yield layout % ((row['direction'], row['name']) + tuple(cells(row['expected']) + cells(row['actual'])) +
                        (error, row['verdict']))


def finite(value):
    """The same for JSON, which has no NaN and no infinity: null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(argv=None):
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(description='Compare two transcripts of main.py.')
    parser.add_argument('expected', metavar='EXPECTED')
    parser.add_argument('actual', metavar='ACTUAL')
    parser.add_argument('--tensors', metavar='FILE', help='what tests/tensors.py printed for the expected run')
    parser.add_argument('--json', action='store_true', help='print everything as JSON')
    arguments = parser.parse_args(argv)
    try:
        rows = compare(parse(arguments.expected), parse(arguments.actual),
                       magnitudes_of(arguments.expected, arguments.tensors))
    except TranscriptError as error:
        print('compare.py: %s' % error, file=sys.stderr)
        return 2
    agree = all(map(agrees, rows))
    if arguments.json:
        print(json.dumps(finite({'agree': agree, 'summary': summary(rows), 'lines': rows}), indent=1, allow_nan=False))
    else:
        print('\n'.join(list(table(rows)) + [''] + summary(rows)))
    return 0 if agree else 1


if __name__ == '__main__':
    sys.stdout.reconfigure(errors='backslashreplace')    # a class in letters that the console lacks
    sys.exit(main())
