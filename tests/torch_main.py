"""What main.py does, in torch, with its transcript: the script that main.py's time is compared with.

    python tests/torch_main.py [IMAGE [CHECKPOINT]]

float32 throughout, as one would write it; layer.py's gradients are float64.
"""
import os
import sys
import time

import cv2
import numpy as np
import torch
from torch.nn import functional

FILE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'file')
CLASSES = ('daisy', 'roses', 'sunflowers', 'tulips')
CONVOLUTIONS = (2, 2, 3, 3, 3)    # in the five stages


def process_image(path):
    image = cv2.cvtColor(cv2.imread(path), cv2.COLOR_BGR2RGB)
    scale = 224 / max(image.shape[:2])
    height, width = round(image.shape[0] * scale), round(image.shape[1] * scale)
    padded = np.full((224, 224, 3), 114, np.float32)
    padded[:height, :width] = cv2.resize(image, (width, height))
    padded -= [125.307, 122.961, 113.8575]
    padded /= [51.5865, 50.847, 51.255]
    return torch.from_numpy(padded).permute(2, 0, 1)[None].contiguous()


def network(parameters):
    """{name: function} of the 37 layers.

    Parameters
    ----------
    parameters : dict
        {name: (weight, bias)} of the layers that have them, tensors.
    """
    def convolution(name):
        return lambda x: functional.conv2d(x, *parameters[name], padding=1)

    def fully_connected(name):
        return lambda x: functional.linear(x, *parameters[name])

    layers = {}
    for stage, count in enumerate(CONVOLUTIONS, 1):
        for k in range(1, count + 1):
            layers['layer%d_conv%d' % (stage, k)] = convolution('layer%d_conv%d' % (stage, k))
            layers['layer%d_relu%d' % (stage, k)] = torch.relu
        layers['layer%d_maxpool' % stage] = lambda x: functional.max_pool2d(x, 2)
    layers['flatten'] = lambda x: torch.flatten(x, 1)
    for k in (1, 2, 3):
        layers['fullyconnect%d' % k] = fully_connected('fullyconnect%d' % k)
        if k < 3:
            layers['relu%d' % k] = torch.relu
    return layers


def main():
    image = sys.argv[1] if len(sys.argv) > 1 else os.path.join(FILE, 'tulips_demo.jpg')
    checkpoint = sys.argv[2] if len(sys.argv) > 2 else os.path.join(FILE, 'vgg16_ckpt.npy')
    parameters = {}
    for name, params in np.load(checkpoint, allow_pickle=True).item().items():
        parameters[name] = torch.from_numpy(params['weight']), torch.from_numpy(params['bias'])
        print('reloaded success')
    layers = network(parameters)

    start = time.time()
    x = process_image(image).requires_grad_()
    inputs = []
    for name, layer in layers.items():
        print('forward: %s: %s %s' % (name, x.mean().item(), x.sum().item()))
        inputs.append(x)
        x = layer(x)
    print(x.detach().numpy())
    print(CLASSES[int(x.argmax())])
    loss = functional.cross_entropy(x, torch.tensor([1]))
    print(loss.item())
    grads = torch.autograd.grad(loss, inputs + [x])
    for name, grad in zip(reversed(list(layers)), reversed(grads)):
        print('backward: %s: %s %s' % (name, grad.mean().item(), grad.sum().item()))
    print(grads[0].mean().item(), grads[0].sum().item())
    print(time.time() - start)


if __name__ == '__main__':
    main()
