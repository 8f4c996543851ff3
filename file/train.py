"""Train the shipped network from the ImageNet convolutions and a folder of flower photos.

    python file/train.py features --photos PHOTOS --weights vgg16_imagenet_conv.npz --work FOLDER

PHOTOS holds one folder a class; FOLDER takes what is computed on the way.  A step that was cut goes on where it
was.
"""
import argparse
import os
import sys
import time

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
import cv2                                                      # noqa: E402
from file.checkpoint import pack, unpack                        # noqa: E402
from main import read_image, to_tensor                          # noqa: E402
from vgg import VGG16                                           # noqa: E402

CLASSES = ('daisy', 'roses', 'sunflowers', 'tulips')
VALIDATION = os.path.join(HERE, 'validation.txt')
BATCH = 4


def say(text):
    print('%s  %s' % (time.strftime('%H:%M:%S'), text), file=sys.stderr, flush=True)


def split(photos):
    """(name, label, is for validation) of every photo: 15 % of each class, drawn once, with a fixed seed."""
    rng = np.random.RandomState(2022)
    rows = []
    for label, flower in enumerate(CLASSES):
        names = sorted(os.listdir(os.path.join(photos, flower)))
        held = set(rng.permutation(len(names))[:int(round(0.15 * len(names)))].tolist())
        rows += [(flower + '/' + name, label, i in held) for i, name in enumerate(names)]
    return rows


def view_of(image, view, index):
    """What training sees of a photo: 0 the photo itself, 1 its mirror image, from 2 on a random crop of it.

    A crop has 45 to 100 % of the area, is turned by up to 15 degrees, mirrored or not, and lighter or darker, more
    or less colourful by up to 25 %.  The same view of the same photo is always the same crop.
    """
    if view == 0:
        return image
    if view == 1:
        return np.ascontiguousarray(image[:, ::-1])
    rng = np.random.RandomState(100003 * view + index)
    h, w = image.shape[:2]
    turn = cv2.getRotationMatrix2D((w / 2, h / 2), rng.uniform(-15, 15), 1)
    image = cv2.warpAffine(image, turn, (w, h), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    area, aspect = rng.uniform(0.45, 1.0), np.exp(rng.uniform(-0.25, 0.25))
    ch, cw = min(h, int(h * np.sqrt(area / aspect))), min(w, int(w * np.sqrt(area * aspect)))
    top, left = rng.randint(h - ch + 1), rng.randint(w - cw + 1)
    image = image[top:top + ch, left:left + cw].astype(np.float32)
    if rng.rand() < 0.5:
        image = image[:, ::-1]
    grey = image.mean(axis=2, keepdims=True)
    image = grey + (image - grey) * rng.uniform(0.75, 1.25)
    image = image * rng.uniform(0.75, 1.25)
    return np.ascontiguousarray(np.clip(image, 0, 255).astype(np.uint8))


def frozen_network(weights):
    """VGG16 with the ImageNet convolutions as they will be shipped, in their packed precision."""
    network = VGG16(len(CLASSES))
    given = np.load(weights)
    for name, layer in network.graph_layers.items():
        if '_conv' in name:
            layer.load_params(unpack(*pack(given[name + '.weight'])), given[name + '.bias'])
    return network


def features(arguments):
    """Compute the output of layer4_maxpool for every view of every photo: what the last stage is trained on."""
    network = frozen_network(arguments.weights)
    names = list(network.graph_layers)
    stages = names[:names.index('layer4_maxpool') + 1]
    rows = split(arguments.photos)
    with open(VALIDATION, 'w', newline='\n') as file:
        file.writelines(name + '\n' for name, _, held in rows if held)
    for view in range(arguments.views):
        wanted = [i for i, (_, _, held) in enumerate(rows) if view == 0 or not held]
        path = os.path.join(arguments.work, 'view%d.npy' % view)
        done = path + '.done'
        if not os.path.exists(path):
            np.lib.format.open_memmap(path, 'w+', np.float16, (len(rows), 512, 14, 14)).flush()
        store = np.lib.format.open_memmap(path, 'r+')
        start = int(open(done).read()) if os.path.exists(done) else 0
        for first in range(start, len(wanted), BATCH):
            batch = wanted[first:first + BATCH]
            x = np.concatenate([to_tensor(view_of(read_image(os.path.join(arguments.photos, rows[i][0])), view, i))
                                for i in batch])
            for name in stages:
                x = network.graph_layers[name].forward(x)
            store[batch] = x
            if first // BATCH % 20 == 0 or first + BATCH >= len(wanted):
                store.flush()
                with open(done, 'w') as file:
                    file.write(str(first + len(batch)))
                say('view %d: %d of %d photos' % (view, first + len(batch), len(wanted)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('step', choices=['features'])
    parser.add_argument('--photos', required=True)
    parser.add_argument('--weights', required=True)
    parser.add_argument('--work', required=True)
    parser.add_argument('--views', type=int, default=6)
    arguments = parser.parse_args()
    os.makedirs(arguments.work, exist_ok=True)
    features(arguments)


if __name__ == '__main__':
    main()
