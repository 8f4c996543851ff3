"""The table of `python vgg.py`: its totals in another way, its rows against what the layers do."""
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np

import vgg
from conftest import PROJECT
from layer import ConvolutionLayer, FlattenLayer, FullyConnectLayer, MaxPoolLayer, ReluLayer

# The paper's configuration D: channels of the convolutions, M for a pooling that halves the planes.
CONFIGURATION_D = '64 64 M 128 128 M 256 256 256 M 512 512 512 M 512 512 512 M'.split()


def totals(table):
    """Parameters and multiply-accumulates of the last two lines."""
    return [int(line.split()[0].replace(',', '')) for line in table.splitlines()[-2:]]


def counted(channels, side, num_classes):
    """The same from the paper's list, convolutions first, without asking a layer."""
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
    return [parameters, macs]


def test_command_and_totals():
    done = subprocess.run([sys.executable, os.path.join(PROJECT, 'vgg.py')], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b'')
    assert totals(done.stdout.decode()) == counted(3, 224, 4) == [134276932, 15466184704]
    assert totals(vgg.summary(vgg.VGG16(1000))) == counted(3, 224, 1000)


def test_rows_add_up_and_no_weight_is_drawn():
    np.random.seed(7)
    before = np.random.get_state()[1].copy()
    lines = vgg.summary(vgg.VGG16()).splitlines()
    np.testing.assert_array_equal(np.random.get_state()[1], before)
    rows = [re.findall(r'([\d,]+) +([\d.]+) %', line) for line in lines[2:-3]]
    cells = [[int(count.replace(',', '')) for count, _ in row] for row in rows if row]
    assert len(rows) == 37 and len(cells) == 16
    assert [sum(column) for column in zip(*cells)] == totals('\n'.join(lines))
    for k in (0, 1):
        assert abs(sum(float(row[k][1]) for row in rows if row) - 100) < 16 * 0.005


def test_counts_are_what_layers_do():
    """Shapes, parameters and operations of small layers, the operations counted one by one in plain loops."""
    conv, connect = ConvolutionLayer(3, 2, 5, padding=1, stride=2), FullyConnectLayer(2 * 2 * 2, 7)
    layers = {'conv': conv, 'relu': ReluLayer(), 'pool': MaxPoolLayer(), 'flat': FlattenLayer(), 'fc': connect}
    macs = {'conv': sum(1 for c in range(2) for h in range(5) for w in range(4)
                        for k in range(3) for i in range(5) for j in range(5)), 'fc': connect.weight.size}
    x, all_parameters = np.zeros((1, 3, 12, 10)), 0
    for name, layer in layers.items():
        shape, x = x.shape[1:], layer.forward(x)
        parameters = layer.weight.size + layer.bias.size if hasattr(layer, 'weight') else 0
        assert vgg.count(layer, shape) == (x.shape[1:], parameters, macs.get(name, 0))
        all_parameters += parameters
    table = vgg.summary(SimpleNamespace(graph_layers=layers), (3, 12, 10))
    assert totals(table) == [all_parameters, sum(macs.values())]
    assert re.split(r' {2,}', table.splitlines()[2])[:3] == ['conv', '3 x 12 x 10', '2 x 5 x 4']
