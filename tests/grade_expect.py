"""What a right submission computes: the results of every layer of a finished package, for some pictures.

    python tests/grade_expect.py FOLDER PACKAGE SEED CKPT PICTURE...

Started by grade.py.  Writes into FOLDER, as .npy files that many processes can map at once: the checkpoint, and for
each picture and layer what forward and backward return.  SEED, if not empty, adds a picture that nobody has seen;
CKPT may be empty.
"""
import json
import os
import sys

import numpy as np


def save(folder, name, array):
    np.save(os.path.join(folder, name + '.npy'), np.asarray(array, dtype=np.float32))


def made_up(path, seed):
    """A picture of coloured clouds and noise, of a random size: nothing in it is even, nothing is known before."""
    import cv2
    rng = np.random.RandomState(seed)
    height, width = rng.randint(180, 321, 2)
    clouds = cv2.resize(rng.randint(0, 256, (9, 9, 3)).astype(np.uint8), (int(width), int(height)),
                        interpolation=cv2.INTER_CUBIC)
    picture = np.clip(clouds + rng.randint(-20, 21, clouds.shape), 0, 255).astype(np.uint8)
    with open(path, 'wb') as file:
        file.write(cv2.imencode('.png', picture)[1].tobytes())


def passes(layers, loss, folder, tensor):
    """Run the network forward and backward, save every result, and return what grade.py needs to know."""
    os.mkdir(folder)
    save(folder, 'tensor', tensor)
    x, dtypes = tensor, {}
    for name, layer in layers.items():
        x = layer.forward(x)
        save(folder, 'forward-' + name, x)
    best = int(np.argmax(x))
    label = 1 if best != 1 else 0    # the handbook's label, unless it is right and its gradient vanishes
    value = loss.forward(x, np.array([label]))
    grad = loss.backward()
    save(folder, 'backward-loss', grad)
    for name, layer in reversed(list(layers.items())):
        dtypes[name] = str(grad.dtype)
        grad = layer.backward(grad)
        save(folder, 'backward-' + name, grad)
    return {'class': best, 'label': label, 'loss': float(value), 'dtypes': dtypes}


def main(folder, package, seed, ckpt, *pictures):
    sys.path.insert(0, package)
    from loss import CrossEntropy
    from main import process_image
    from vgg import VGG16
    from file import checkpoint, once
    once.compile_once()

    layers = VGG16().graph_layers
    shapes = {name: layer.weight_shape for name, layer in layers.items() if hasattr(layer, 'weight_shape')}
    for name, params in checkpoint.load(ckpt or None, shapes).items():
        layers[name].load_params(params['weight'], params['bias'])
        for key in ('weight', 'bias'):
            save(folder, '%s.%s' % (name, key), params[key])
    named = [(os.path.basename(path), path) for path in pictures]
    if seed:
        path = os.path.join(folder, 'made_up.png')
        made_up(path, int(seed))
        named.append(('picture of seed ' + seed, path))
    facts = {'layers': [[name, type(layer).__name__] for name, layer in layers.items()],
             'parameters': list(shapes), 'pictures': []}
    for index, (title, path) in enumerate(named):
        fact = passes(layers, CrossEntropy(), os.path.join(folder, str(index)), process_image(path))
        facts['pictures'].append(dict(fact, title=title, path=path))
    with open(os.path.join(folder, 'expected.json'), 'w') as file:
        json.dump(facts, file)


if __name__ == '__main__':
    try:
        main(*sys.argv[1:])
    except Exception as error:    # the class of a checkpoint's or a picture's error is the package's own
        sys.exit(str(error) or type(error).__name__)
