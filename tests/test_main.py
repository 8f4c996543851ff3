"""main.py: its arguments, what it prints and where, and what it says of a network that is not VGG16."""
import os
import re
import shutil
import subprocess
import sys
from subprocess import PIPE

import cv2
import numpy as np
import pytest

import main
import picture
import vgg
from layer import ConvolutionLayer, ReluLayer

SCRIPT = main.__file__


class Small(object):
    """In VGG16's place: always the same answer, at once."""

    def __init__(self, num_classes):
        pass

    def resume_weights(self, ckpt):
        for _ in ckpt:
            print('reloaded success')

    def forward(self, x):
        print('forward')
        return np.array([[0, 3, 0, 0]], dtype=np.float32)

    def backward(self, grad):
        print('backward')
        return np.repeat(grad, 2)


@pytest.fixture
def quick(monkeypatch):
    """A run without the network."""
    monkeypatch.setattr(main, 'VGG16', Small)
    monkeypatch.setattr(main, 'load_checkpoint', lambda path: {'one': {}, 'two': {}})
    monkeypatch.setattr(picture, 'draw', lambda *_: np.full((20, 30, 3), 99, np.uint8))


def refused(capsys, arguments=()):
    """The one line that main.py says when it ends before it prints anything."""
    try:
        status = main.main(list(arguments))
    except SystemExit as error:
        status = error.code
    printed = capsys.readouterr()
    assert status in (1, 2) and printed.out == ''
    return printed.err


# ----------------------------------------------------------------------------------------- arguments and output

@pytest.mark.parametrize('arguments, words', [
    (['absent.jpg'], 'absent.jpg: cannot be read'),
    (['--label', 'dandelion'], "argument --label: 'dandelion' is no class: give a number from 0 to 3 or one of daisy"),
    (['--label', '4'], 'argument --label'),
    (['--label', '-1'], 'argument --label'),
    (['--ckpt', 'absent.npy'], 'absent.npy: cannot be read (No such file'),
    (['one.jpg', 'two.jpg'], 'unrecognized arguments: two.jpg'),
    (['--picture', 'out.gif'], 'out.gif: a picture file must end in'),
])
def test_wrong_arguments_are_named_before_anything_is_printed(arguments, words, capsys):
    assert words in refused(capsys, arguments)


def test_labels_by_name_and_number():
    assert [main.class_number(text) for text in main.CLASSES] == [0, 1, 2, 3]
    assert [main.class_number(text) for text in '0123'] == [0, 1, 2, 3]
    assert main.arguments_of([]).label == 1


def test_the_handbooks_lines_in_their_order(quick, capsys):
    assert main.main(['--label', 'tulips']) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[:5] == ['reloaded success', 'reloaded success', 'forward', '[[0. 3. 0. 0.]]', 'roses']
    np.testing.assert_allclose(float(lines[5]), np.log(3 + np.exp(3)), rtol=1e-6)
    assert lines[6] == 'backward' and len(lines[7].split()) == 2 and 0 <= float(lines[8]) < 10
    assert len(lines) == 9 and err == ''


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='writes to a full device')
def test_a_full_disk_is_said(quick, capsys, monkeypatch):
    with open('/dev/full', 'w') as full:
        monkeypatch.setattr(sys, 'stdout', full)
        assert main.main([]) == 1
    assert re.match(r'main.py: no room for standard output .*\(No space left on device\).*\n\Z', capsys.readouterr().err)


def test_a_closed_output_is_said(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'stdout', None)    # what Python makes of `>&-`
    assert main.main([]) == 1
    assert capsys.readouterr().err.startswith('main.py: standard output is closed')


@pytest.mark.parametrize('error, status, words', [(KeyboardInterrupt, 130, 'interrupted'),
                                                  (MemoryError, 1, 'not enough memory')])
def test_ctrl_c_and_too_little_memory_end_it_in_a_line(quick, monkeypatch, capsys, error, status, words):
    def fail(*_):
        raise error
    monkeypatch.setattr(Small, 'forward', fail)
    assert main.main([]) == status
    assert words in capsys.readouterr().err.splitlines()[0]


def test_it_finds_its_files_through_a_link_and_from_anywhere(tmp_path):
    link = str(tmp_path / 'link.py')
    os.symlink(SCRIPT, link)
    done = subprocess.run([sys.executable, link, '--ckpt', 'absent.npy'], cwd=str(tmp_path), stderr=PIPE)
    assert done.stderr.decode().startswith('main.py: absent.npy: cannot be read')    # and the demo picture can


# ------------------------------------------------------------------------------------------------- --picture

def test_a_picture_overwrites_nothing_unasked_and_never_what_is_read(quick, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(str(tmp_path))
    cv2.imwrite('photo.png', np.zeros((10, 10, 3), np.uint8))
    with open('photo.png', 'rb') as file:
        before = file.read()
    assert 'photo.png: is there already' in refused(capsys, ['--picture', 'photo.png'])
    os.symlink('photo.png', 'link.png')
    os.link('photo.png', 'same.png')
    for name in ('photo.png', './photo.png', 'link.png', 'same.png', os.path.abspath('photo.png')):
        for overwrite in ([], ['--overwrite']):
            assert name + ': is a file that is read' in refused(capsys, ['photo.png', '--picture', name] + overwrite)
    assert main.main(['photo.png', '--picture', 'out.png']) == 0
    assert cv2.imread('out.png').shape == (20, 30, 3)
    capsys.readouterr()
    assert 'out.png: is there already' in refused(capsys, ['photo.png', '--picture', 'out.png'])
    assert main.main(['photo.png', '--picture', 'out.png', '--overwrite']) == 0
    with open('photo.png', 'rb') as file:
        assert file.read() == before
    assert sorted(os.listdir('.')) == ['link.png', 'out.png', 'photo.png', 'same.png']


def test_a_file_that_came_during_the_run_is_left(quick, tmp_path, capsys, monkeypatch):
    out = tmp_path / 'out.png'
    monkeypatch.setattr(Small, 'backward', lambda self, grad: out.write_bytes(b'new') and grad)
    assert main.main(['--picture', str(out)]) == 1
    assert 'is there already' in capsys.readouterr().err
    assert out.read_bytes() == b'new' and os.listdir(str(tmp_path)) == ['out.png']


# ----------------------------------------------------------------------------------- a network that is not VGG16

def wrong_network(change):
    network = vgg.VGG16()
    change(network)
    network.create_graph()
    return network


def left_out(network):
    create, name = network.create_graph, 'layer3_conv3'
    network.create_graph = lambda: create() or network.graph_layers.pop(name)


MISFITS = {
    'wrong size': (lambda network: setattr(network, 'layer4_conv2', ConvolutionLayer(512, 256, 3, padding=1)),
                   'vgg.py: layer4_conv2: its weight has shape (256, 512, 3, 3), that of VGG16 (512, 512, 3, 3)'),
    'wrong window': (lambda network: setattr(network, 'layer1_conv1', ConvolutionLayer(3, 64, 5, padding=2)),
                     'vgg.py: layer1_conv1: its weight has shape (64, 3, 5, 5), that of VGG16 (64, 3, 3, 3)'),
    'wrong layer': (lambda network: setattr(network, 'layer2_conv2', ReluLayer()),
                    'vgg.py: layer2_conv2 is a ReluLayer, which has no weight'),
    'left out': (left_out, 'vgg.py: graph_layers has no layer3_conv3'),
    'no graph': (lambda network: setattr(network, 'create_graph', lambda: setattr(network, 'graph_layers', None)),
                 'vgg.py: graph_layers has no layer1_conv1'),
}


@pytest.mark.parametrize('name', sorted(MISFITS))
def test_a_layer_that_does_not_fit_is_vggs_and_not_the_checkpoints(name, monkeypatch, capsys):
    change, words = MISFITS[name]
    zeros = {layer: {'weight': np.broadcast_to(np.float32(0), shape), 'bias': np.zeros(shape[0], np.float32)}
             for layer, shape in main.SHAPES.items()}
    monkeypatch.setattr(main, 'VGG16', lambda num_classes: wrong_network(change))
    monkeypatch.setattr(main, 'load_checkpoint', lambda path: zeros)
    assert main.main([]) == 1
    assert capsys.readouterr().err == 'main.py: %s\n' % words


def test_a_network_that_is_not_finished_says_what_is_to_be_made(tmp_path):
    """The handbook's listing as it is given: the first stage alone, and the graph."""
    for name in ('main.py', 'layer.py', 'loss.py'):
        shutil.copy(os.path.join(main.HERE, name), str(tmp_path))
    (tmp_path / 'file').mkdir()
    shutil.copy(main.IMAGE, str(tmp_path / 'file'))
    with open(vgg.__file__) as file:
        lines = [line for line in file if not line.strip().startswith('self.layer2_conv1 =')]
    (tmp_path / 'vgg.py').write_text(''.join(lines))
    number = [n for n, line in enumerate(lines, 1) if "'layer2_conv1': self.layer2_conv1" in line]
    done = subprocess.run([sys.executable, 'main.py'], cwd=str(tmp_path), stdout=PIPE, stderr=PIPE)
    assert done.stderr.decode().splitlines() == ['main.py: layer2_conv1 is not made yet: vgg.py line %d' % number[0]]
    assert done.returncode == 1 and done.stdout == b''


def test_a_folder_without_loss_and_tests(tmp_path):
    """The older edition of the course has its loss in layer.py."""
    for name in ('main.py', 'vgg.py', 'layer.py'):
        shutil.copy(os.path.join(main.HERE, name), str(tmp_path))
    with open(str(tmp_path / 'layer.py'), 'a') as file:
        file.write('\n\nclass CrossEntropy(object):\n    pass\n')
    script = 'import main; print(main.CrossEntropy.__module__); main.main([%r, "--picture", "a.png"])' % main.IMAGE
    done = subprocess.run([sys.executable, '-c', script], cwd=str(tmp_path), stdout=PIPE, stderr=PIPE)
    assert done.stdout.split() == [b'layer']
    assert done.stderr.decode() == 'main.py: --picture needs tests/picture.py, which is not there\n'
