"""Train the shipped network from the ImageNet convolutions and a folder of flower photos.

    python file/making/train.py features --photos PHOTOS --weights vgg16_imagenet_conv.npz --work FOLDER
    python file/making/train.py train    --photos PHOTOS --weights vgg16_imagenet_conv.npz --work FOLDER

PHOTOS holds one folder a class; FOLDER takes what is computed on the way, 0.5 GB a view.  A step that was cut goes
on where it was.  `features` runs the first four stages, which stay as they are, over several views of every photo.
`train` trains the fifth stage and the three fully connected layers on them, with the layers and the loss of this
package, writes vgg16_flowers.npz and prints its accuracy on the validation photos.
"""
import argparse
import os
import sys
import time

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.append(os.path.dirname(os.path.dirname(HERE)))
import cv2                                                      # noqa: E402
from expand import PACKED, PLANE, exit_if_there, pack, unpack   # noqa: E402
from main import process_image, read_image                      # noqa: E402
from layer import ConvolutionLayer, FullyConnectLayer, MaxPoolLayer, ReluLayer    # noqa: E402
from loss import CrossEntropy                                   # noqa: E402
from vgg import VGG16                                           # noqa: E402

CLASSES = ('daisy', 'roses', 'sunflowers', 'tulips')
BATCH = 4
MEMORY = 0.99    # the running mean forgets in about 100 steps


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
    with open(os.path.join(arguments.work, 'validation.txt'), 'w', newline='\n') as file:
        file.writelines(name + '\n' for name, _, held in rows if held)
    for view in arguments.views:
        wanted = [i for i, (_, _, held) in enumerate(rows) if view == 0 or not held]
        path = os.path.join(arguments.work, 'view%d.npy' % view)
        done = path + '.done'
        if not os.path.exists(path):
            np.lib.format.open_memmap(path, 'w+', np.float16, (len(rows), 512, 14, 14)).flush()
        store = np.lib.format.open_memmap(path, 'r+')
        start = int(open(done).read()) if os.path.exists(done) else 0
        for first in range(start, len(wanted), BATCH):
            batch = wanted[first:first + BATCH]
            x = np.concatenate([process_image(view_of(read_image(os.path.join(arguments.photos, rows[i][0])), view, i))
                                for i in batch])
            for name in stages:
                x = network.graph_layers[name].forward(x)
            store[batch] = x
            if first // BATCH % 20 == 0 or first + BATCH >= len(wanted):
                store.flush()
                with open(done, 'w') as file:
                    file.write(str(first + len(batch)))
                say('view %d: %d of %d photos' % (view, first + len(batch), len(wanted)))


# ------------------------------------------------------------------------------------------------ training

class Average(object):
    """The mean of each plane: fullyconnect1 has the same weight for all 49 numbers of a plane (see expand.py)."""

    def forward(self, inputs):
        self.input_shape = inputs.shape
        return inputs.mean(axis=(2, 3))

    def backward(self, out_grad):
        area = self.input_shape[2] * self.input_shape[3]
        return np.broadcast_to((out_grad / area)[:, :, None, None], self.input_shape)


class Dropout(object):
    """Forget a share of the numbers while training, and scale the others up."""

    def __init__(self, share, rng):
        self.share, self.rng, self.kept = share, rng, None

    def forward(self, inputs):
        self.kept = (self.rng.rand(*inputs.shape) >= self.share).astype(inputs.dtype) / (1 - self.share)
        return inputs * self.kept

    def backward(self, out_grad):
        return out_grad * self.kept


class TrainedConvolution(ConvolutionLayer):
    """A convolution that also has the gradients of its parameters."""

    passes_on = True    # whether a layer before it is trained, too

    def forward(self, inputs):
        self.inputs = inputs
        return super().forward(inputs)

    def backward(self, out_grad):
        out_grad = np.ascontiguousarray(out_grad, dtype=np.float32)
        _, channels, height, width = self.inputs.shape
        padded = np.pad(self.inputs.transpose(0, 2, 3, 1), ((0, 0), (1, 1), (1, 1), (0, 0)), mode='constant')
        flat = out_grad.transpose(1, 0, 2, 3).reshape(self.out_channels, -1)
        self.grad_weight = np.empty(self.weight.shape, np.float32)
        for i in range(self.kernel_size):
            for j in range(self.kernel_size):
                seen = padded[:, i:i + height, j:j + width].reshape(-1, channels)
                self.grad_weight[:, :, i, j] = flat @ seen
        self.grad_bias = flat.sum(axis=1)
        return super().backward(out_grad) if self.passes_on else None


class Adam(object):
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv:1711.05101), and a running mean of the weights."""

    def __init__(self, layers, decay):
        self.layers, self.decay, self.steps = layers, decay, 0
        self.first, self.second, self.mean = {}, {}, {}
        for name, layer in layers.items():
            for key in ('weight', 'bias'):
                value = np.array(getattr(layer, key), dtype=np.float32)
                setattr(layer, key, value)
                self.first[name, key], self.second[name, key] = np.zeros_like(value), np.zeros_like(value)
                self.mean[name, key] = value.copy()

    def step(self, rates):
        """One step with the gradients that the layers hold; rates maps layers that take part to their learning rates."""
        self.steps += 1
        correction = np.sqrt(1 - 0.999**self.steps) / (1 - 0.9**self.steps)
        for name, rate in rates.items():
            layer = self.layers[name]
            for key in ('weight', 'bias'):
                value = getattr(layer, key)
                gradient = getattr(layer, 'grad_' + key).astype(np.float32, copy=False)
                first, second, mean = self.first[name, key], self.second[name, key], self.mean[name, key]
                first += 0.1 * (gradient - first)
                second += 0.001 * (gradient * gradient - second)
                if key == 'weight':
                    value *= 1 - rate * self.decay
                value -= rate * correction * first / (np.sqrt(second) + 1e-8)
                mean += (1 - min(MEMORY, self.steps / (10.0 + self.steps))) * (value - mean)


def forward(layers, x):
    for layer in layers:
        x = layer.forward(x)
    return x


def backward(layers, grad):
    for layer in reversed(layers):
        grad = layer.backward(grad.astype(np.float32, copy=False))
    return grad


def smoothed(loss, labels, smoothing):
    """The gradient of the cross-entropy against labels that leave a share to the other classes."""
    grad = loss.backward()
    grad += smoothing / len(labels) * (np.eye(len(CLASSES))[labels] - 1.0 / len(CLASSES))
    return grad


def layers_to_train(arguments):
    """What follows layer4_maxpool: (layers for use, layers for training, {name: layer that is trained})."""
    rng = np.random.RandomState(arguments.seed)
    given = np.load(arguments.weights)
    used, training, trained = [], [], {}
    for i in (1, 2, 3):
        name = 'layer5_conv%d' % i
        trained[name] = TrainedConvolution(512, 512, 3, padding=1)
        trained[name].load_params(given[name + '.weight'].astype(np.float32), given[name + '.bias'])
        used += [trained[name], ReluLayer()]
    trained['layer5_conv1'].passes_on = False
    used += [MaxPoolLayer(), Average()]
    training += used
    # He's initial deviation, less where the numbers that come in are large, and little for the logits
    shapes = ((512, 4096, 0.25), (4096, 4096, 1), (4096, len(CLASSES), 0.1))
    for i, (inputs, outputs, share) in enumerate(shapes):
        if i > 0:
            used.append(ReluLayer())
            training += [used[-1], Dropout(arguments.dropout, rng)]
        name = 'fullyconnect%d' % (i + 1)
        trained[name] = FullyConnectLayer(inputs, outputs)
        trained[name].load_params((rng.randn(outputs, inputs) * share * np.sqrt(2.0 / inputs)).astype(np.float32),
                                  np.zeros(outputs, np.float32))
        used.append(trained[name])
        training.append(trained[name])
    return used, training, trained


def confusion(layers, parameters, view, labels, wanted):
    """How often each class (row) was taken for each class (column), with these parameters {layer: (weight, bias)}."""
    before = {layer: (layer.weight, layer.bias) for layer in parameters}
    for layer, values in parameters.items():
        layer.load_params(*values)
    table = np.zeros((len(CLASSES), len(CLASSES)), int)
    for start in range(0, len(wanted), 16):
        some = wanted[start:start + 16]
        logits = forward(layers, view[some].astype(np.float32))
        np.add.at(table, (labels[some], logits.argmax(axis=1)), 1)
    for layer, values in before.items():
        layer.load_params(*values)
    return table


def save_state(path, epoch, optimiser):
    """Keep all that the next epoch needs."""
    arrays = {'epoch': epoch, 'steps': optimiser.steps}
    for name, layer in optimiser.layers.items():
        for key in ('weight', 'bias'):
            arrays['value.%s.%s' % (name, key)] = getattr(layer, key)
            for kind in ('first', 'second', 'mean'):
                arrays['%s.%s.%s' % (kind, name, key)] = getattr(optimiser, kind)[name, key]
    np.savez(path + '.part.npz', **arrays)
    os.replace(path + '.part.npz', path)


def load_state(path, optimiser):
    """Go on where save_state stopped; return the epoch."""
    if not os.path.exists(path):
        return 0
    with np.load(path) as arrays:
        optimiser.steps = int(arrays['steps'])
        for name, layer in optimiser.layers.items():
            for key in ('weight', 'bias'):
                setattr(layer, key, arrays['value.%s.%s' % (name, key)])
                for kind in ('first', 'second', 'mean'):
                    getattr(optimiser, kind)[name, key] = arrays['%s.%s.%s' % (kind, name, key)]
        return int(arrays['epoch'])


def train(arguments):
    """Train the fifth stage and the head, and write the running mean of their weights, packed."""
    rows = split(arguments.photos)
    labels = np.array([label for _, label, _ in rows])
    held = np.array([i for i, row in enumerate(rows) if row[2]])
    seen = np.array([i for i, row in enumerate(rows) if not row[2]])
    views = [np.load(os.path.join(arguments.work, 'view%d.npy' % view), mmap_mode='r') for view in arguments.views]
    used, training, trained = layers_to_train(arguments)
    head = training[training.index(next(layer for layer in training if isinstance(layer, Average))):]
    optimiser, loss = Adam(trained, arguments.decay), CrossEntropy()
    state = os.path.join(arguments.work, arguments.state)

    def mean():
        return {layer: (optimiser.mean[name, 'weight'], optimiser.mean[name, 'bias']) for name, layer in trained.items()}

    for epoch in range(load_state(state, optimiser), arguments.epochs):
        rng = np.random.RandomState(1000 + epoch)
        order, total = rng.permutation(seen), 0.0
        for start in range(0, len(order), arguments.batch):
            batch = order[start:start + arguments.batch]
            x = np.stack([views[rng.randint(len(views))][i] for i in batch]).astype(np.float32)
            done = (epoch + start / len(order)) / arguments.epochs
            fade = 0.5 * (1 + np.cos(np.pi * done)) * min(1, 0.01 + optimiser.steps / 100)
            total += loss.forward(forward(training, x), labels[batch]) * len(batch)
            grad = smoothed(loss, labels[batch], arguments.smoothing)
            if epoch < arguments.warm:
                backward(head, grad)
                optimiser.step({name: fade * arguments.head_rate for name in trained if 'conv' not in name})
            else:
                backward(training, grad)
                optimiser.step({name: fade * (arguments.rate if 'conv' in name else arguments.head_rate)
                                for name in trained})
        save_state(state, epoch + 1, optimiser)
        table = confusion(used, mean(), views[0], labels, held)
        say('epoch %d of %d: loss %.4f, validation %.2f %%' % (
            epoch + 1, arguments.epochs, total / len(order), 100 * table.trace() / table.sum()))

    packed, shipped = {}, {}
    given = np.load(arguments.weights)
    for key in given.files:
        name = key[:-len('.weight')]
        if key.endswith('.weight') and name not in trained:
            packed[name + '.q'], packed[name + '.scale'] = pack(given[key])
            packed[name + '.bias'] = given[name + '.bias']
    for name, layer in trained.items():
        weight, bias = mean()[layer]
        share = PLANE if name == 'fullyconnect1' else 1
        q, scale = pack(weight / share)
        packed[name + '.q'], packed[name + '.scale'], packed[name + '.bias'] = q, scale, bias
        shipped[layer] = unpack(q, scale) * np.float32(share), bias
    np.savez_compressed(arguments.out + '.part.npz', **packed)
    os.replace(arguments.out + '.part.npz', arguments.out)
    table = confusion(used, shipped, views[0], labels, held)
    print('%s: %d bytes' % (os.path.basename(arguments.out), os.path.getsize(arguments.out)))
    print('parameters trained: %d' % sum(layer.weight.size + layer.bias.size for layer in trained.values()))
    print('validation: %d of %d right, %.2f %%' % (table.trace(), table.sum(), 100 * table.trace() / table.sum()))
    print('%-12s' % 'is \\ taken for' + ''.join('%12s' % flower for flower in CLASSES))
    for flower, row in zip(CLASSES, table):
        print('%-12s  ' % flower + ''.join('%12d' % count for count in row))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('step', choices=['features', 'train'])
    parser.add_argument('--photos', required=True, help='a folder with a folder of photos for each class')
    parser.add_argument('--weights', required=True, help='the ImageNet convolutions, .npz')
    parser.add_argument('--work', required=True, help='a folder for what is computed on the way')
    parser.add_argument('--views', type=int, nargs='+', default=list(range(6)), help='which views (default: 0 to 5)')
    parser.add_argument('--out', default=PACKED, help='what train writes, a new file (default: %(default)s)')
    parser.add_argument('--state', default='state.npz', help='where in --work train keeps its progress')
    parser.add_argument('--epochs', type=int, default=9)
    parser.add_argument('--warm', type=int, default=1, help='epochs in which only the fully connected layers learn')
    parser.add_argument('--batch', type=int, default=32)
    parser.add_argument('--rate', type=float, default=2e-5, help='largest learning rate of the convolutions')
    parser.add_argument('--head-rate', type=float, default=3e-4, help='and of the fully connected layers')
    parser.add_argument('--dropout', type=float, default=0.5)
    parser.add_argument('--smoothing', type=float, default=0.1)
    parser.add_argument('--decay', type=float, default=0.02)
    parser.add_argument('--seed', type=int, default=1)
    arguments = parser.parse_args()
    if arguments.step == 'train':
        exit_if_there('train.py', arguments.out)
    os.makedirs(arguments.work, exist_ok=True)
    {'features': features, 'train': train}[arguments.step](arguments)


if __name__ == '__main__':
    main()
