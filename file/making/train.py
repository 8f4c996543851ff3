"""Train the shipped network from the ImageNet convolutions and a folder of flower photos.

    python file/making/train.py --photos PHOTOS --weights vgg16_imagenet_conv.npz --work FOLDER --out NEW.npz

PHOTOS holds one folder a class.  The first three stages stay as they are; the fourth, the fifth and the three fully
connected layers are trained with the layers and the loss of this package, on pictures that are cropped, coloured and
mixed anew in every epoch.  FOLDER keeps the progress: a training that was cut goes on where it was.
At the end it writes the packed network and prints its accuracy on the validation photos, which nothing before it sees.
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
MEMORY = 0.99    # the running mean forgets in about 100 steps
FROZEN = 'layer3_maxpool'    # the last layer that is not trained
KEPT = 10    # steps after which the progress is kept
PART = 4     # pictures that go through the frozen stages at a time: 32 would need gigabytes


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


def view_of(image, rng):
    """What one epoch sees of a photo: a crop of 35 to 100 % of it, turned by up to 20 degrees, mirrored or not, and
    lighter or darker, more or less colourful by up to 35 %."""
    h, w = image.shape[:2]
    turn = cv2.getRotationMatrix2D((w / 2, h / 2), rng.uniform(-20, 20), 1)
    image = cv2.warpAffine(image, turn, (w, h), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    area, aspect = rng.uniform(0.35, 1.0), np.exp(rng.uniform(-0.25, 0.25))
    ch, cw = min(h, int(h * np.sqrt(area / aspect))), min(w, int(w * np.sqrt(area * aspect)))
    top, left = rng.randint(h - ch + 1), rng.randint(w - cw + 1)
    image = image[top:top + ch, left:left + cw].astype(np.float32)
    if rng.rand() < 0.5:
        image = image[:, ::-1]
    grey = image.mean(axis=2, keepdims=True)
    image = grey + (image - grey) * rng.uniform(0.65, 1.35)
    image = image * rng.uniform(0.65, 1.35)
    return np.ascontiguousarray(np.clip(image, 0, 255).astype(np.uint8))


def frozen_layers(weights):
    """The stages that are not trained, with the ImageNet convolutions in the precision that is shipped."""
    layers = []
    for name, layer in VGG16(len(CLASSES)).graph_layers.items():
        if '_conv' in name:
            layer.load_params(unpack(*pack(weights[name + '.weight'])), weights[name + '.bias'])
        layers.append(layer)
        if name == FROZEN:
            return layers


def seen_by(frozen, pictures):
    """What the frozen stages make of pictures."""
    return np.concatenate([forward(frozen, pictures[i:i + PART]) for i in range(0, len(pictures), PART)])


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


def loss_and_gradient(logits, labels, others, share, smoothing):
    """The cross-entropy for pictures that are a share of their own and the rest of another, and its gradient where
    the labels leave a little to all classes."""
    loss, total, grad, one = CrossEntropy(), 0.0, 0.0, np.eye(len(CLASSES))
    for part, those in ((share, labels), (1 - share, others)):
        total += part * loss.forward(logits, those)
        grad += part * (loss.backward() + smoothing / len(those) * (one[those] - 1.0 / len(CLASSES)))
    return total, grad


def layers_to_train(weights, rng, dropout):
    """What follows the frozen stages: (layers for use, layers for training, {name: layer that is trained})."""
    used, training, trained = [], [], {}
    for stage, channels in ((4, 256), (5, 512)):
        for i in (1, 2, 3):
            name = 'layer%d_conv%d' % (stage, i)
            trained[name] = TrainedConvolution(channels if i == 1 else 512, 512, 3, padding=1)
            trained[name].load_params(weights[name + '.weight'].astype(np.float32), weights[name + '.bias'])
            used += [trained[name], ReluLayer()]
        used.append(MaxPoolLayer())
    trained['layer4_conv1'].passes_on = False
    used.append(Average())
    training += used
    # He's initial deviation, less where the numbers that come in are large, and little for the logits
    shapes = ((512, 4096, 0.25), (4096, 4096, 1), (4096, len(CLASSES), 0.1))
    for i, (inputs, outputs, share) in enumerate(shapes):
        if i > 0:
            used.append(ReluLayer())
            training += [used[-1], Dropout(dropout, rng)]
        name = 'fullyconnect%d' % (i + 1)
        trained[name] = FullyConnectLayer(inputs, outputs)
        trained[name].load_params((rng.randn(outputs, inputs) * share * np.sqrt(2.0 / inputs)).astype(np.float32),
                                  np.zeros(outputs, np.float32))
        used.append(trained[name])
        training.append(trained[name])
    return used, training, trained


def confusion(layers, parameters, inputs, labels):
    """How often each class (row) was taken for each class (column), with these parameters {layer: (weight, bias)}."""
    for layer, values in parameters.items():
        layer.load_params(*values)
    table = np.zeros((len(CLASSES), len(CLASSES)), int)
    for start in range(0, len(labels), PART):
        logits = forward(layers, inputs(start, start + PART))
        np.add.at(table, (labels[start:start + PART], logits.argmax(axis=1)), 1)
    return table


def save_state(path, optimiser):
    """Keep all that the next step needs."""
    arrays = {'steps': optimiser.steps}
    for name, layer in optimiser.layers.items():
        for key in ('weight', 'bias'):
            arrays['value.%s.%s' % (name, key)] = getattr(layer, key)
            for kind in ('first', 'second', 'mean'):
                arrays['%s.%s.%s' % (kind, name, key)] = getattr(optimiser, kind)[name, key]
    np.savez(path + '.part.npz', **arrays)
    os.replace(path + '.part.npz', path)


def load_state(path, optimiser):
    """Go on where save_state stopped."""
    if not os.path.exists(path):
        return
    with np.load(path) as arrays:
        optimiser.steps = int(arrays['steps'])
        for name, layer in optimiser.layers.items():
            for key in ('weight', 'bias'):
                setattr(layer, key, arrays['value.%s.%s' % (name, key)])
                for kind in ('first', 'second', 'mean'):
                    getattr(optimiser, kind)[name, key] = arrays['%s.%s.%s' % (kind, name, key)]


def train(arguments):
    """Train the fourth and the fifth stage and the head, and write the running mean of their weights, packed."""
    rows = split(arguments.photos)
    with open(os.path.join(arguments.work, 'validation.txt'), 'w', newline='\n') as file:
        file.writelines(name + '\n' for name, _, held in rows if held)
    labels = np.array([label for _, label, _ in rows])
    held = np.array([i for i, row in enumerate(rows) if row[2]])
    seen = np.array([i for i, row in enumerate(rows) if not row[2]])
    weights = np.load(arguments.weights)
    frozen = frozen_layers(weights)
    rng = np.random.RandomState(arguments.seed)
    used, training, trained = layers_to_train(weights, rng, arguments.dropout)
    head = training[training.index(next(layer for layer in training if isinstance(layer, Average))):]
    optimiser = Adam(trained, arguments.decay)
    state = os.path.join(arguments.work, 'state.npz')
    load_state(state, optimiser)

    def photo(i):
        return read_image(os.path.join(arguments.photos, rows[i][0]))

    an_epoch = -(-len(seen) // arguments.batch)
    losses = []
    while optimiser.steps < arguments.epochs * an_epoch:
        epoch, place = divmod(optimiser.steps, an_epoch)
        rng.seed([arguments.seed, epoch])
        batch = rng.permutation(seen)[place * arguments.batch:(place + 1) * arguments.batch]
        rng.seed([arguments.seed, arguments.epochs + optimiser.steps])    # the same again, were it cut
        pictures = np.concatenate([process_image(view_of(photo(i), rng)) for i in batch])
        other, share = rng.permutation(len(batch)), rng.beta(arguments.mixing, arguments.mixing)
        if epoch < arguments.warm or epoch >= arguments.epochs - arguments.plain:
            share = 1.0
        mixed = (share * pictures + (1 - share) * pictures[other]).astype(np.float32)
        fade = 0.5 * (1 + np.cos(np.pi * optimiser.steps / (arguments.epochs * an_epoch)))
        fade *= min(1, 0.01 + optimiser.steps / 100)
        value, grad = loss_and_gradient(forward(training, seen_by(frozen, mixed)), labels[batch],
                                        labels[batch[other]], share, arguments.smoothing)
        losses.append(value)
        if epoch < arguments.warm:
            backward(head, grad)
            optimiser.step({name: fade * arguments.head_rate for name in trained if 'conv' not in name})
        else:
            backward(training, grad)
            optimiser.step({name: fade * (arguments.rate if 'conv' in name else arguments.head_rate)
                            for name in trained})
        if optimiser.steps % KEPT == 0 or optimiser.steps % an_epoch == 0:
            save_state(state, optimiser)
            say('epoch %d of %d, step %d of %d: loss %.4f' % (
                epoch + 1, arguments.epochs, place + 1, an_epoch, np.mean(losses)))
            losses = []

    packed, shipped = {}, {}
    for key in weights.files:
        name = key[:-len('.weight')]
        if key.endswith('.weight') and name not in trained:
            packed[name + '.q'], packed[name + '.scale'] = pack(weights[key])
            packed[name + '.bias'] = weights[name + '.bias']
    for name, layer in trained.items():
        weight, bias = optimiser.mean[name, 'weight'], optimiser.mean[name, 'bias']
        share = PLANE if name == 'fullyconnect1' else 1
        q, scale = pack(weight / share)
        packed[name + '.q'], packed[name + '.scale'], packed[name + '.bias'] = q, scale, bias
        shipped[layer] = unpack(q, scale) * np.float32(share), bias
    np.savez_compressed(arguments.out + '.part.npz', **packed)
    os.replace(arguments.out + '.part.npz', arguments.out)
    table = confusion(used, shipped, lambda start, end: seen_by(
        frozen, np.concatenate([process_image(photo(i)) for i in held[start:end]])), labels[held])
    print('%s: %d bytes' % (os.path.basename(arguments.out), os.path.getsize(arguments.out)))
    print('parameters trained: %d' % sum(layer.weight.size + layer.bias.size for layer in trained.values()))
    print('validation: %d of %d right, %.2f %%' % (table.trace(), table.sum(), 100 * table.trace() / table.sum()))
    print('%-12s' % 'is \\ taken for' + ''.join('%12s' % flower for flower in CLASSES))
    for flower, row in zip(CLASSES, table):
        print('%-12s  ' % flower + ''.join('%12d' % count for count in row))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--photos', required=True, help='a folder with a folder of photos for each class')
    parser.add_argument('--weights', required=True, help='the ImageNet convolutions, .npz')
    parser.add_argument('--work', required=True, help='a folder for the progress')
    parser.add_argument('--out', default=PACKED, help='what is written, a new file (default: %(default)s)')
    parser.add_argument('--epochs', type=int, default=6)
    parser.add_argument('--warm', type=int, default=1, help='epochs at first in which only the head learns')
    parser.add_argument('--plain', type=int, default=1, help='epochs at last in which pictures are not mixed')
    parser.add_argument('--batch', type=int, default=32)
    parser.add_argument('--rate', type=float, default=5e-5, help='largest learning rate of the convolutions')
    parser.add_argument('--head-rate', type=float, default=3e-4, help='and of the fully connected layers')
    parser.add_argument('--mixing', type=float, default=0.3, help='alpha of mixup')
    parser.add_argument('--dropout', type=float, default=0.5)
    parser.add_argument('--smoothing', type=float, default=0.1)
    parser.add_argument('--decay', type=float, default=0.02)
    parser.add_argument('--seed', type=int, default=1)
    arguments = parser.parse_args()
    exit_if_there('train.py', arguments.out)
    os.makedirs(arguments.work, exist_ok=True)
    train(arguments)


if __name__ == '__main__':
    main()
