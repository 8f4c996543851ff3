"""The picture of `main.py --picture`: what it shows, and that a file is written whole or not at all."""
import os

import cv2
import numpy as np
import pytest

import picture
from layer import ConvolutionLayer, FlattenLayer, FullyConnectLayer, MaxPoolLayer, ReluLayer

CLASSES = ('daisy', 'roses', 'sunflowers')


class Small(object):
    """Two stages and a fully connected layer for planes of 16 x 16."""

    def __init__(self):
        rng = np.random.RandomState(4)
        self.graph_layers = {
            'layer1_conv1': ConvolutionLayer(3, 4, 3, padding=1), 'layer1_relu1': ReluLayer(),
            'layer1_conv2': ConvolutionLayer(4, 8, 3, padding=1), 'layer1_relu2': ReluLayer(),
            'layer1_maxpool': MaxPoolLayer(), 'layer2_conv1': ConvolutionLayer(8, 10, 3, padding=1),
            'layer2_relu1': ReluLayer(), 'layer2_maxpool': MaxPoolLayer(),
            'flatten': FlattenLayer(), 'fullyconnect1': FullyConnectLayer(10 * 4 * 4, 3)}
        for layer in self.graph_layers.values():
            if hasattr(layer, 'load_params'):
                layer.load_params(rng.normal(0, 0.3, layer.weight.shape), layer.bias)

    def logits(self, x):
        for layer in self.graph_layers.values():
            x = layer.forward(x)
        return x[0]


def given(monkeypatch, planes, probabilities, gradient):
    """Make picture.follow answer with these, and the picture of a photo half as high as it is wide."""
    answer = {'layer1_relu2': planes}, np.log(np.array(probabilities, dtype=np.float32)), gradient
    monkeypatch.setattr(picture, 'follow', lambda model, tensor: answer)
    return picture.draw(np.full((30, 60, 3), 90, np.uint8), np.zeros((1, 3, 16, 16), np.float32), None, CLASSES)


def test_follow_keeps_the_last_relu_of_each_stage_and_prints_nothing(capsys):
    x = np.random.RandomState(1).normal(0, 1, (1, 3, 16, 16))
    model = Small()
    stages, logits, _ = picture.follow(model, x)
    assert {name: planes.shape for name, planes in stages.items()} == {
        'layer1_relu2': (8, 16, 16), 'layer2_relu1': (10, 8, 8)}
    assert np.array_equal(logits, model.logits(x))
    for name, planes in stages.items():
        assert np.array_equal(planes, np.maximum(0, planes)) and planes.max() > 0, name
    assert capsys.readouterr() == ('', '')


def test_follow_gives_the_gradient_of_the_largest_logit():
    rng = np.random.RandomState(2)
    x, model = rng.normal(0, 1, (1, 3, 16, 16)), Small()
    _, logits, gradient = picture.follow(model, x)
    for _ in range(5):
        way = rng.normal(0, 1, x.shape)
        step = 1e-6 * way
        slope = (model.logits(x + step) - model.logits(x - step))[logits.argmax()] / 2e-6
        assert abs(slope - (gradient * way[0]).sum()) < 1e-5 * np.abs(gradient * way[0]).sum()


def test_bars_are_as_long_as_the_probabilities(monkeypatch):
    drawn = given(monkeypatch, np.ones((1, 16, 16), np.float32), (0.25, 0.6, 0.15), np.zeros((3, 16, 16)))
    coloured = (drawn == picture.RED).all(axis=2), (drawn == picture.INK).all(axis=2)
    ground = (drawn == picture.PALE).all(axis=2)
    bars = []    # rows in which ink or red is followed by the pale ground up to the right margin
    for row in range(drawn.shape[0]):
        for colour, marked in zip('ri', coloured):
            end = picture.WIDTH - picture.MARGIN
            left = end - np.argmin(ground[row, :end][::-1])
            start = left - np.argmin(marked[row, :left][::-1])
            if left < end and left - start > 30:
                bars.append((colour, (left - start) / (end - start)))
    shown = sorted(set((colour, round(share, 2)) for colour, share in bars))
    assert shown == [('i', 0.15), ('i', 0.25), ('r', 0.6)]


def test_padding_is_left_out(monkeypatch):
    """Gradients and feature maps below the photo change nothing."""
    rng = np.random.RandomState(3)
    planes, gradient = rng.rand(9, 16, 16).astype(np.float32), rng.rand(3, 16, 16)
    before = given(monkeypatch, planes, (0.2, 0.3, 0.5), gradient)
    planes[8, 8:], gradient[:, 8:] = 1000, 1000
    assert np.array_equal(before, given(monkeypatch, planes, (0.2, 0.3, 0.5), gradient))
    gradient[:, 5] = 1000
    assert not np.array_equal(before, given(monkeypatch, planes, (0.2, 0.3, 0.5), gradient))


def test_the_strongest_maps_are_shown(monkeypatch):
    """Of nine maps the six with the largest mean: a change of one of the others is not seen, of these it is."""
    planes = np.random.RandomState(5).rand(9, 16, 16).astype(np.float32)
    planes *= np.array([9, 1, 8, 2, 7, 3, 6, 5, 4], dtype=np.float32)[:, None, None]
    before = given(monkeypatch, planes, (0.2, 0.3, 0.5), np.zeros((3, 16, 16)))
    for k in range(9):
        changed = planes.copy()
        changed[k] = changed[k, :, ::-1]
        after = given(monkeypatch, changed, (0.2, 0.3, 0.5), np.zeros((3, 16, 16)))
        assert np.array_equal(before, after) == (k in (1, 3, 5)), k


@pytest.mark.parametrize('shape', [(16, 16), (1, 1), (3, 900), (900, 3), (700, 500)])
def test_any_photo_can_be_drawn(shape):
    image = np.random.RandomState(6).randint(0, 256, shape + (3,)).astype(np.uint8)
    drawn = picture.draw(image, np.ones((1, 3, 16, 16)), Small(), CLASSES)
    assert drawn.dtype == np.uint8 and drawn.shape[1:] == (picture.WIDTH, 3)
    frame = np.ones(drawn.shape[:2], bool)
    frame[30:-30, picture.MARGIN - 8:-picture.MARGIN + 8] = False
    assert (drawn[frame] == picture.PAPER).all(), 'something runs into the margin'


def test_text_ends_where_it_should():
    for right in (False, True):
        page = np.full((100, 600, 3), 255, np.uint8)
        width = picture.text(page, '24.4 %', 300, 60, 23, colour=(0, 0, 0), right=right)
        columns = np.nonzero((page < 128).any(axis=(0, 2)))[0]
        rows = np.nonzero((page < 128).any(axis=(1, 2)))[0]
        left = 300 - width if right else 300
        assert left - 3 <= columns[0] and columns[-1] <= left + width + 3 and len(columns) > 0.5 * width
        assert abs(rows[-1] - 60) <= 3 and abs(rows[0] - 37) <= 4


@pytest.mark.parametrize('name, reason', [
    ('out.gif', 'must end in'), ('out', 'must end in'), ('nowhere/out.png', 'no folder'), ('folder.png', 'is a folder'),
    ('old.png', 'is there already'), ('dangling.png', 'is there already')])
def test_a_path_that_cannot_be_written_is_refused(tmp_path, name, reason):
    (tmp_path / 'folder.png').mkdir()
    (tmp_path / 'old.png').write_bytes(b'old')
    (tmp_path / 'dangling.png').symlink_to('nowhere.png')
    path = str(tmp_path / name)
    with pytest.raises(ValueError, match=reason) as error:
        picture.check_path(path)
    assert str(error.value).startswith(path + ': ')


@pytest.mark.parametrize('extension', picture.EXTENSIONS + ('.PNG',))
def test_every_extension_can_be_written(tmp_path, extension):
    path = str(tmp_path / ('out' + extension))
    page = np.full((20, 30, 3), (250, 10, 100), np.uint8)
    picture.write(path, page)
    assert np.abs(cv2.imread(path)[:, :, ::-1].astype(int) - page).max() <= (8 if extension in ('.jpg', '.jpeg') else 0)
    assert os.listdir(str(tmp_path)) == ['out' + extension]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / 'out.png'
    path.write_bytes(b'old')
    monkeypatch.setattr(os, 'replace', lambda *_: (_ for _ in ()).throw(OSError('disk full')))
    with pytest.raises(OSError):
        picture.write(str(path), np.zeros((4, 4, 3), np.uint8), overwrite=True)
    assert path.read_bytes() == b'old' and os.listdir(str(tmp_path)) == ['out.png']
