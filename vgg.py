"""VGG16 as an ordered dict of layers, handbook 2.2.2 and 2.5.3."""
from layer import ConvolutionLayer, FlattenLayer, FullyConnectLayer, MaxPoolLayer, ReluLayer


class VGG16(object):
    """VGG16 (Simonyan and Zisserman, arXiv:1409.1556): 13 convolutions, 5 poolings, 3 fully connected layers.

    Parameters
    ----------
    num_classes : int
        Outputs of the last fully connected layer.

    Attributes
    ----------
    graph_layers : dict
        The 37 layers by name, in the order in which a picture passes them.
    """

    def __init__(self, num_classes=4):
        self.layer1_conv1 = ConvolutionLayer(in_channels=3, out_channels=64, kernel_size=3, padding=1)
        self.layer1_relu1 = ReluLayer()
        self.layer1_conv2 = ConvolutionLayer(in_channels=64, out_channels=64, kernel_size=3, padding=1)
        self.layer1_relu2 = ReluLayer()
        self.layer1_maxpool = MaxPoolLayer(kernel_size=2, stride=2)

        self.layer2_conv1 = ConvolutionLayer(in_channels=64, out_channels=128, kernel_size=3, padding=1)
        self.layer2_relu1 = ReluLayer()
        self.layer2_conv2 = ConvolutionLayer(in_channels=128, out_channels=128, kernel_size=3, padding=1)
        self.layer2_relu2 = ReluLayer()
        self.layer2_maxpool = MaxPoolLayer(kernel_size=2, stride=2)

        self.layer3_conv1 = ConvolutionLayer(in_channels=128, out_channels=256, kernel_size=3, padding=1)
        self.layer3_relu1 = ReluLayer()
        self.layer3_conv2 = ConvolutionLayer(in_channels=256, out_channels=256, kernel_size=3, padding=1)
        self.layer3_relu2 = ReluLayer()
        self.layer3_conv3 = ConvolutionLayer(in_channels=256, out_channels=256, kernel_size=3, padding=1)
        self.layer3_relu3 = ReluLayer()
        self.layer3_maxpool = MaxPoolLayer(kernel_size=2, stride=2)

        self.layer4_conv1 = ConvolutionLayer(in_channels=256, out_channels=512, kernel_size=3, padding=1)
        self.layer4_relu1 = ReluLayer()
        self.layer4_conv2 = ConvolutionLayer(in_channels=512, out_channels=512, kernel_size=3, padding=1)
        self.layer4_relu2 = ReluLayer()
        self.layer4_conv3 = ConvolutionLayer(in_channels=512, out_channels=512, kernel_size=3, padding=1)
        self.layer4_relu3 = ReluLayer()
        self.layer4_maxpool = MaxPoolLayer(kernel_size=2, stride=2)

        self.layer5_conv1 = ConvolutionLayer(in_channels=512, out_channels=512, kernel_size=3, padding=1)
        self.layer5_relu1 = ReluLayer()
        self.layer5_conv2 = ConvolutionLayer(in_channels=512, out_channels=512, kernel_size=3, padding=1)
        self.layer5_relu2 = ReluLayer()
        self.layer5_conv3 = ConvolutionLayer(in_channels=512, out_channels=512, kernel_size=3, padding=1)
        self.layer5_relu3 = ReluLayer()
        self.layer5_maxpool = MaxPoolLayer(kernel_size=2, stride=2)

        self.flatten = FlattenLayer()
        self.fullyconnect1 = FullyConnectLayer(in_features=512 * 7 * 7, out_features=4096)
        self.relu_1 = ReluLayer()
        self.fullyconnect2 = FullyConnectLayer(in_features=4096, out_features=4096)
        self.relu_2 = ReluLayer()
        self.fullyconnect3 = FullyConnectLayer(in_features=4096, out_features=num_classes)

        self.graph_layers = None
        self.create_graph()

    def create_graph(self):
        """Name the layers and put them in order."""
        self.graph_layers = {
            'layer1_conv1': self.layer1_conv1, 'layer1_relu1': self.layer1_relu1,
            'layer1_conv2': self.layer1_conv2, 'layer1_relu2': self.layer1_relu2,
            'layer1_maxpool': self.layer1_maxpool,

            'layer2_conv1': self.layer2_conv1, 'layer2_relu1': self.layer2_relu1,
            'layer2_conv2': self.layer2_conv2, 'layer2_relu2': self.layer2_relu2,
            'layer2_maxpool': self.layer2_maxpool,

            'layer3_conv1': self.layer3_conv1, 'layer3_relu1': self.layer3_relu1,
            'layer3_conv2': self.layer3_conv2, 'layer3_relu2': self.layer3_relu2,
            'layer3_conv3': self.layer3_conv3, 'layer3_relu3': self.layer3_relu3,
            'layer3_maxpool': self.layer3_maxpool,

            'layer4_conv1': self.layer4_conv1, 'layer4_relu1': self.layer4_relu1,
            'layer4_conv2': self.layer4_conv2, 'layer4_relu2': self.layer4_relu2,
            'layer4_conv3': self.layer4_conv3, 'layer4_relu3': self.layer4_relu3,
            'layer4_maxpool': self.layer4_maxpool,

            'layer5_conv1': self.layer5_conv1, 'layer5_relu1': self.layer5_relu1,
            'layer5_conv2': self.layer5_conv2, 'layer5_relu2': self.layer5_relu2,
            'layer5_conv3': self.layer5_conv3, 'layer5_relu3': self.layer5_relu3,
            'layer5_maxpool': self.layer5_maxpool,

            'flatten': self.flatten,
            'fullyconnect1': self.fullyconnect1, 'relu1': self.relu_1,
            'fullyconnect2': self.fullyconnect2, 'relu2': self.relu_2,
            'fullyconnect3': self.fullyconnect3,
        }

    def forward(self, x):
        """Classify pictures, printing the mean and the sum of each layer's input.

        Parameters
        ----------
        x : ndarray (N, 3, 224, 224), float32 or float64

        Returns
        -------
        ndarray (N, num_classes), dtype of x
            Logits.
        """
        for name in self.graph_layers.keys():
            print(f'forward: {name}: {x.mean()} {x.sum()}')
            x = self.graph_layers[name].forward(x)
        return x

    def backward(self, grad):
        """Propagate back to the pictures, printing the mean and the sum of each layer's output gradient.

        Parameters
        ----------
        grad : ndarray (N, num_classes), float32 or float64
            Gradient of the logits of the last forward.

        Returns
        -------
        ndarray (N, 3, 224, 224), float64
        """
        for name in reversed(list(self.graph_layers.keys())):
            print(f'backward: {name}: {grad.mean()} {grad.sum()}')
            grad = self.graph_layers[name].backward(grad)
        return grad

    def resume_weights(self, ckpt):
        """Load a checkpoint and say so after each layer.

        Parameters
        ----------
        ckpt : dict
            {layer name: {'weight': ndarray, 'bias': ndarray}}; the arrays are taken as they are, not copied.

        Raises
        ------
        KeyError, AssertionError
            For a name or a shape that is not the network's.
        """
        for name, params in ckpt.items():
            self.graph_layers[name].load_params(params['weight'], params['bias'])
            print('reloaded success')

    def summary(self, input_shape=(3, 224, 224)):
        """Parameters and operations, layer by layer, from shapes alone: no weight is drawn and nothing computed.

        A layer's parameters are its weights and biases.  Its operations are multiply-accumulates (MACs) of weights:
        each weight takes part once in every output that it serves, which are all H_out * W_out positions of a plane
        in a convolution, and one number in a fully connected layer.

        Parameters
        ----------
        input_shape : tuple of int
            Channels, height and width of one picture.

        Returns
        -------
        str
            A table, its totals, and the memory that parameters and layer outputs take as float32.

        Raises
        ------
        ValueError
            If a layer cannot take what the layer before it gives.
        """
        rows, shape = [], tuple(input_shape)
        for name, layer in self.graph_layers.items():
            if not _takes(layer, shape):
                raise ValueError('%s: cannot take an input of %s' % (name, _text(shape)))
            window, out, weights, biases, served = _count(layer, shape)
            rows.append((name, shape, out, window, weights + biases, weights * served))
            shape = out
        parameters, macs = sum(row[4] for row in rows), sum(row[5] for row in rows)
        outputs = sum(_size(row[2]) for row in rows)

        line = '%-16s%-17s%-17s%-7s%12s%9s%16s%9s'
        head = line % ('layer', 'input', 'output', 'K P S', 'parameters', 'share', 'MACs', 'share')
        lines = [head, '-' * len(head)]
        for name, shape, out, window, *counts in rows:
            cells = [name, _text(shape), _text(out), window]
            for count, total in zip(counts, (parameters, macs)):
                cells += [format(count, ','), '%.2f %%' % (100 * count / total)] if count else ['', '']
            lines.append((line % tuple(cells)).rstrip())
        lines.append('-' * len(head))
        for text, count, size in (
                ('parameters', parameters, '%.1f MiB as float32' % (parameters * 4 / 2**20)),
                ('multiply-accumulates', macs, '%.2f GFLOP at 2 FLOPs each; weights only' % (macs * 2 / 1e9)),
                ('outputs of all layers', outputs, '%.1f MiB as float32, for one picture' % (outputs * 4 / 2**20))):
            lines.append('%-22s %15s   = %s' % (text, format(count, ','), size))
        return '\n'.join(lines)


def _size(shape):
    """How many numbers a shape holds."""
    size = 1
    for length in shape:
        size *= length
    return size


def _text(shape):
    return ' x '.join(str(length) for length in shape)


def _takes(layer, shape):
    """Whether the layer can be given one picture of this shape."""
    if isinstance(layer, FullyConnectLayer):
        return shape == (layer.in_features,)
    if isinstance(layer, ReluLayer):
        return True
    if isinstance(layer, FlattenLayer):
        return len(shape) == 3
    return (len(shape) == 3 and shape[0] == getattr(layer, 'in_channels', shape[0])
            and min(shape[1:]) + 2 * getattr(layer, 'padding', 0) >= layer.kernel_size)


def _count(layer, shape):
    """(window as text, output shape, weights, biases, outputs that each weight serves) of a layer given `shape`."""
    if isinstance(layer, FullyConnectLayer):
        return '', (layer.out_features,), layer.out_features * layer.in_features, layer.out_features, 1
    if isinstance(layer, FlattenLayer):
        return '', (_size(shape),), 0, 0, 0
    if isinstance(layer, ReluLayer):
        return '', shape, 0, 0, 0
    K, S = layer.kernel_size, layer.stride
    P = getattr(layer, 'padding', 0)
    height, width = (shape[1] + 2 * P - K) // S + 1, (shape[2] + 2 * P - K) // S + 1
    if isinstance(layer, MaxPoolLayer):
        return '%d - %d' % (K, S), (shape[0], height, width), 0, 0, 0
    return ('%d %d %d' % (K, P, S), (layer.out_channels, height, width),
            layer.out_channels * layer.in_channels * K * K, layer.out_channels, height * width)


if __name__ == '__main__':
    print(VGG16().summary())
