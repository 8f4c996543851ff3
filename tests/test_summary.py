"""The table of `python vgg.py`: its totals in another way, its rows against what the layers do."""
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from layer import ConvolutionLayer, FullyConnectLayer
import vgg
from vgg import VGG16

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# The paper's configuration D: channels of the convolutions, M for a pooling that halves the planes.
CONFIGURATION_D = '64 64 M 128 128 M 256 256 256 M 512 512 512 M 512 512 512 M'.split()


def totals(text):
    """The last lines' numbers: parameters, multiply-accumulates, outputs."""
    return [int(line.split('=')[0].split()[-1].replace(',', '')) for line in text.splitlines()[-3:]]


def counted(channels, side, num_classes):
    """(parameters, multiply-accumulates) from the paper's list, convolutions first, without asking a layer."""
    parameters = macs = 0
    for step in CONFIGURATION_D:
        if step == 'M':
            side //= 2
            continue
        parameters += int(step) * (9 * channels + 1)
        macs += side**2 * int(step) * 9 * channels
        channels = int(step)
    widths = [channels * side**2, 4096, 4096, num_classes]
    for before, after in zip(widths, widths[1:]):
        parameters += after * (before + 1)
        macs += after * before
    return parameters, macs


def test_totals():
    assert totals(VGG16().summary())[:2] == [134276932, 15466184704]
    assert tuple(totals(VGG16().summary())[:2]) == counted(3, 224, 4)
    assert tuple(totals(VGG16(1000).summary())[:2]) == counted(3, 224, 1000)


def test_rows_add_up_to_the_totals():
    lines = VGG16().summary().splitlines()
    rows = [re.findall(r'([\d,]+) +([\d.]+) %', line) for line in lines[2:-4]]
    cells = [[int(count.replace(',', '')) for count, _ in row] for row in rows if row]
    assert len(lines) == 2 + 37 + 4 and len(cells) == 16
    assert [sum(column) for column in zip(*cells)] == totals('\n'.join(lines))[:2]
    for k in (0, 1):
        assert abs(sum(float(row[k][1]) for row in rows if row) - 100) < 16 * 0.005


def test_rows_say_what_layers_do():
    """Shapes, parameters and operations of small layers, the operations counted one by one in plain loops."""
    model = VGG16()
    x = np.zeros((1, 3, 12, 10))
    conv, fc = ConvolutionLayer(3, 2, 5, padding=1, stride=2), FullyConnectLayer(2 * 2 * 2, 7)
    model.graph_layers = {'conv': conv, 'relu': model.relu_1, 'pool': model.layer1_maxpool, 'flat': model.flatten,
                          'fc': fc}
    outputs = 0
    for line, layer in zip(model.summary((3, 12, 10)).splitlines()[2:], model.graph_layers.values()):
        x = layer.forward(x)
        outputs += x.size
        assert re.split(r' {2,}', line)[2] == ' x '.join(map(str, x.shape[1:])), line
    macs = sum(1 for c in range(2) for h in range(5) for w in range(4) for k in range(3) for i in range(5)
               for j in range(5)) + fc.weight.size
    assert totals(model.summary((3, 12, 10))) == [conv.weight.size + 2 + fc.weight.size + 7, macs, outputs]


def test_no_weight_is_drawn():
    np.random.seed(7)
    before = np.random.get_state()[1:3]
    VGG16().summary()
    after = np.random.get_state()[1:3]
    assert np.array_equal(before[0], after[0]) and before[1] == after[1]


@pytest.mark.parametrize('shape, layer', [((3, 200, 200), 'fullyconnect1'), ((1, 224, 224), 'layer1_conv1'),
                                          ((3, 16, 16), 'layer5_maxpool'), ((150528,), 'layer1_conv1')])
def test_an_input_that_does_not_fit_is_named(shape, layer):
    with pytest.raises(ValueError, match='^%s: ' % layer):
        VGG16().summary(shape)


def test_command(tmp_path):
    done = subprocess.run([sys.executable, os.path.join(PROJECT, 'vgg.py')], cwd=str(tmp_path),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    assert (done.returncode, done.stderr, done.stdout) == (0, '', VGG16().summary() + '\n')


@pytest.mark.parametrize('dtype', [np.float32, np.float64])
def test_printed_mean_and_sum_are_numpys_to_the_bit(dtype):
    rng = np.random.RandomState(4)
    for shape in [(1,), (1, 3), (1, 3, 7, 11), (2, 64, 30, 30), (1, 64, 112, 112), (1, 25088)] * 8:
        x = (rng.randn(*shape) * 10.0**rng.randint(-9, 9) + rng.randn()).astype(dtype)
        for view in (x, x[..., ::-1], x[..., 1:] if shape[-1] > 1 else x):
            mean, total = vgg._mean_and_sum(view)
            assert (mean, total) == (view.mean(), view.sum())
            assert (str(mean), str(total)) == (str(view.mean()), str(view.sum()))
