"""One run of the network as a picture: what went in, what came out, and what the five stages saw in between."""
import os

import cv2
import numpy as np

EXTENSIONS = ('.png', '.jpg', '.jpeg', '.bmp', '.tif', '.tiff')

PAPER, INK, GREY, PALE, RED = (250, 248, 243), (27, 45, 58), (120, 124, 124), (226, 222, 212), (201, 68, 38)
WIDTH, MARGIN, GAP, SEAM = 1800, 120, 44, 12
SMALL, MEDIUM, LARGE = 18, 23, 76    # heights of capital letters
TILES = (6, 8, 10, 13, 17)           # feature maps in the five rows: like the planes, smaller and more from row to row
FINE = 6                             # text is drawn so many times larger and shrunk: smooth in every OpenCV


def check_path(path, overwrite=False, inputs=()):
    """ValueError, in one line, if a picture may not or could not be written to path: to be asked before a long run.

    Parameters
    ----------
    path : str
    overwrite : bool
        Whether a file that is there may be replaced.
    inputs : sequence of str
        Files that may not be, by whatever name.
    """
    folder, extension = os.path.dirname(path) or '.', os.path.splitext(path)[1].lower()
    if extension not in EXTENSIONS:
        raise ValueError('%s: a picture file must end in one of %s' % (path, ', '.join(EXTENSIONS)))
    if not os.path.isdir(folder):
        raise ValueError('%s: there is no folder %s; create it first' % (path, folder))
    if not os.access(folder, os.W_OK):
        raise ValueError('%s: the folder %s cannot be written to; choose another' % (path, folder))
    if os.path.isdir(path):
        raise ValueError('%s: is a folder; name a file in it' % path)
    if os.path.exists(path) and any(os.path.samefile(path, name) for name in inputs if name and os.path.exists(name)):
        raise ValueError('%s: is a file that is read; name another' % path)
    if os.path.lexists(path) and not overwrite:
        raise ValueError('%s: is there already; name another, or add --overwrite' % path)


def write(path, picture, overwrite=False):
    """Write an RGB picture (H, W, 3), uint8, whole or not at all: under another name first, then renamed."""
    encoded = cv2.imencode(os.path.splitext(path)[1].lower(), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))[1]
    part = '%s.%d.part' % (path, os.getpid())
    with open(part, 'xb') as file:
        try:
            file.write(encoded.tobytes())
            file.close()
            check_path(path, overwrite)    # again: a run takes a while
            os.replace(part, path)
        except BaseException:
            os.remove(part)
            raise


def text(picture, words, x, baseline, size, colour=INK, bold=False, right=False):
    """Write words on a picture and return their width; x is their left end, or with right=True their right end.

    OpenCV 4 draws pen strokes of any thickness, OpenCV 5 outlines of two weights, the lighter one for thickness 1.
    Words are placed one by one: the space between OpenCV 4's words is as wide as a letter.
    """
    outlines = int(cv2.__version__.split('.')[0]) >= 5
    scale = FINE * size / (20 if outlines else 22)
    stroke = 1 if outlines and not bold else int(round(FINE * size * (0.17 if bold else 0.115)))
    font, margin, space = cv2.FONT_HERSHEY_SIMPLEX, 2 * FINE, int(0.45 * FINE * size)
    words = words.split()
    widths = [cv2.getTextSize(word, font, scale, stroke)[0][0] for word in words]
    width = sum(widths) + space * (len(words) - 1)
    height = 2 * FINE * size
    mask = np.zeros((2 * height // FINE * FINE, (width + 2 * margin + FINE) // FINE * FINE), np.uint8)
    at = margin
    for word, length in zip(words, widths):
        cv2.putText(mask, word, (at, height), font, scale, 255, stroke, cv2.LINE_AA)
        at += length + space
    mask = cv2.resize(mask, (mask.shape[1] // FINE, mask.shape[0] // FINE), interpolation=cv2.INTER_AREA)
    width = int(round(width / FINE))
    left, top = int(round(x)) - (width if right else 0) - margin // FINE, int(round(baseline)) - height // FINE
    mask = mask[max(0, -top):, max(0, -left):]
    under = picture[max(0, top):max(0, top) + mask.shape[0], max(0, left):max(0, left) + mask.shape[1]]
    under[:] = shade(mask[:under.shape[0], :under.shape[1]] / 255, colour, under)
    return width


def shade(strength, colour, ground):
    """RGB pictures between ground, where strength (H, W) is 0, and colour, where it is 1."""
    return np.round(ground + (np.array(colour) - np.array(ground, dtype=float)) * strength[..., None]).astype(np.uint8)


def paste(picture, left, top, part):
    picture[top:top + len(part), left:left + part.shape[1]] = part


def fit(height, width, box_height, box_width):
    """The largest (height, width) of the same proportions in a box; at least one pixel."""
    scale = min(box_height / height, box_width / width)
    return max(1, int(round(height * scale))), max(1, int(round(width * scale)))


def resize(planes, size):
    """Planes of any kind as size = (height, width): averaged when they shrink, smooth when they grow."""
    shrinks = size[0] < planes.shape[0]
    return cv2.resize(planes, size[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)


def follow(model, tensor):
    """Send a picture through the network and the score of the class that it finds back, printing nothing.

    Parameters
    ----------
    model : VGG16
    tensor : ndarray (1, 3, H, W)

    Returns
    -------
    tuple
        The last ReLU of each stage as {its name: ndarray (C, H, W)}, the logits (classes,), and the gradient of
        the largest logit with respect to the tensor, ndarray (3, H, W).
    """
    stages, x = {}, tensor
    for name, layer in model.graph_layers.items():
        x = layer.forward(x)
        if x.ndim == 4 and 'relu' in name:
            stages[name.split('_')[0]] = name, x[0]    # a later one of the same stage takes its place
    logits = x[0]
    gradient = np.zeros_like(x)
    gradient[0, logits.argmax()] = 1
    for layer in reversed(list(model.graph_layers.values())):
        gradient = layer.backward(gradient)
    return dict(stages.values()), logits, gradient[0]


def draw(image, tensor, model, classes):
    """Draw one run of the network.

    Parameters
    ----------
    image : ndarray (H, W, 3), uint8
        The photo, RGB.
    tensor : ndarray (1, 3, S, S), float32
        The network's input made of it: scaled into the upper left corner, the rest is padding and is left out.
    model : VGG16
        With its weights loaded.
    classes : sequence of str

    Returns
    -------
    ndarray (height, 1800, 3), uint8
        RGB; the height follows from the proportions of the photo.
    """
    stages, logits, gradient = follow(model, tensor)
    probabilities = np.exp(logits - logits.max(), dtype=np.float64)
    probabilities /= probabilities.sum()
    found = int(logits.argmax())
    side = tensor.shape[-1]
    seen = fit(image.shape[0], image.shape[1], side, side)    # of the S x S numbers, those that show the photo

    photo = fit(image.shape[0], image.shape[1], 600, 520)
    columns = MARGIN + np.arange(3) * (max(photo[1], 380) + GAP)
    height = max(photo[0], len(classes) * 94)
    pitches = [(WIDTH - 2 * MARGIN + SEAM) / count for count in TILES]
    tiles = [fit(image.shape[0], image.shape[1], 4 / 3 * (pitch - SEAM), pitch - SEAM) for pitch in pitches]
    top = 386
    rows = top + height + 180 + np.cumsum([0] + [tile[0] + 118 for tile in tiles])
    picture = np.full((rows[-1] + MARGIN, WIDTH, 3), PAPER, np.uint8)

    text(picture, 'One picture through VGG16', MARGIN, 142, MEDIUM, GREY)
    width = text(picture, classes[found], MARGIN - 4, 258, LARGE, bold=True)
    text(picture, '%.1f %%' % (100 * probabilities[found]), MARGIN + width + 40, 258, LARGE, RED)

    for x, title, note in zip(columns, ('Input', 'Gradient', 'Probability'), (
            '%d x %d, seen as %d x %d' % (image.shape[1], image.shape[0], seen[1], seen[0]),
            'of the score of %s' % classes[found], 'softmax of the %d scores' % len(classes))):
        text(picture, title, x, top - 28, MEDIUM, bold=True)
        text(picture, note, x, top + height + 42, SMALL, GREY)
    large = resize(image, photo)
    paste(picture, columns[0], top, large)
    heat = cv2.GaussianBlur(np.abs(gradient[:, :seen[0], :seen[1]]).sum(axis=0), (0, 0), side / 60)
    heat = np.maximum(0, heat - np.median(heat))
    heat = np.clip(resize(heat, photo) / max(heat.max(), 1e-300), 0, 1)
    dark = 1 - cv2.cvtColor(large, cv2.COLOR_RGB2GRAY) / 255
    paste(picture, columns[1], top, shade(0.9 * heat, RED, shade(0.7 * dark, INK, PAPER)))

    length = WIDTH - MARGIN - columns[2]
    for k, name in enumerate(classes):
        y = top + 34 + k * (height - 34 - 58) // max(1, len(classes) - 1)
        colour = RED if k == found else INK
        text(picture, name, columns[2], y + MEDIUM, MEDIUM, colour, bold=k == found)
        text(picture, '%.1f %%' % (100 * probabilities[k]), WIDTH - MARGIN, y + MEDIUM, MEDIUM, colour, right=True)
        picture[y + 40:y + 58, columns[2]:columns[2] + length] = PALE
        picture[y + 40:y + 58, columns[2]:columns[2] + int(round(length * probabilities[k]))] = colour

    for k, (name, planes) in enumerate(stages.items()):
        shown = [-(-planes.shape[1] * pixels // side) for pixels in seen]    # rounded up
        order = np.argsort(-planes[:, :shown[0], :shown[1]].mean(axis=(1, 2)), kind='stable')[:TILES[k]]
        width = text(picture, 'Stage %d' % (k + 1), MARGIN, rows[k] - 26, MEDIUM, bold=True)
        text(picture, '%s: %d of %d feature maps, %d x %d' % (name, len(order), len(planes), *planes.shape[1:]),
             MARGIN + width + 28, rows[k] - 26, SMALL, GREY)
        for place, plane in enumerate(planes[order]):
            plane = cv2.resize(plane, (side, side), interpolation=cv2.INTER_NEAREST)[:seen[0], :seen[1]]
            plane = np.clip(resize(plane.astype(np.float64), tiles[k]) / max(plane.max(), 1e-30), 0, 1)
            paste(picture, MARGIN + int(round(place * pitches[k])), rows[k], shade(plane ** 0.6, INK, PALE))
    for line, words in enumerate((
            'Feature maps: in each stage those with the largest mean; dark is the largest number of a map.',
            'Gradient: how strongly a pixel moves the logit of the class found, all colours together, smoothed.')):
        text(picture, words, MARGIN, rows[-1] - 34 + 40 * line, SMALL, GREY)
    return picture
