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
        """Logits (N, num_classes) of pictures x (N, 3, 224, 224); prints the mean and the sum of each layer's input."""
        for name in self.graph_layers.keys():
            print(f'forward: {name}: {x.mean()} {x.sum()}')
            x = self.graph_layers[name].forward(x)
        return x

    def backward(self, grad):
        """Gradient of the pictures, from that of the logits; prints the mean and the sum of each layer's gradient."""
        for name in reversed(list(self.graph_layers.keys())):
            print(f'backward: {name}: {grad.mean()} {grad.sum()}')
            grad = self.graph_layers[name].backward(grad)
        return grad

    def resume_weights(self, ckpt):
        """Load {layer name: {'weight': array, 'bias': array}}: the arrays as they are, not copies."""
        for name, params in ckpt.items():
            self.graph_layers[name].load_params(params['weight'], params['bias'])
            print('reloaded success')


def count(layer, shape):
    """(output shape, parameters, multiply-accumulates) of a layer that is given one picture, or row, of this shape.

    Parameters are weights and biases.  A weight is multiplied once for each output that it serves: for H_out * W_out
    positions of a plane in a convolution, for one number in a fully connected layer.  Nothing is drawn or computed.
    """
    if isinstance(layer, FullyConnectLayer):
        weights = layer.out_features * layer.in_features
        return (layer.out_features,), weights + layer.out_features, weights
    if isinstance(layer, FlattenLayer):
        return (shape[0] * shape[1] * shape[2],), 0, 0
    if isinstance(layer, ReluLayer):
        return shape, 0, 0
    K, S, P = layer.kernel_size, layer.stride, getattr(layer, 'padding', 0)
    height, width = (shape[1] + 2 * P - K) // S + 1, (shape[2] + 2 * P - K) // S + 1
    if isinstance(layer, MaxPoolLayer):
        return (shape[0], height, width), 0, 0
    weights = layer.out_channels * layer.in_channels * K * K
    return (layer.out_channels, height, width), weights + layer.out_channels, weights * height * width


def summary(model, shape=(3, 224, 224)):
    """The answer to the handbook's first question, layer by layer: a table as text."""
    line = '%-16s%-17s%-17s%13s%9s%16s%9s'
    rows = []
    for name, layer in model.graph_layers.items():
        out, parameters, macs = count(layer, shape)
        rows.append((name, shape, out, parameters, macs))
        shape = out
    totals = [sum(row[column] for row in rows) for column in (3, 4)]
    lines = [line % ('layer', 'input', 'output', 'parameters', 'share', 'MACs', 'share')]
    for name, shape, out, *counts in rows:
        cells = [name, ' x '.join(map(str, shape)), ' x '.join(map(str, out))]
        for number, total in zip(counts, totals):
            cells += ['{:,}'.format(number), '%.2f %%' % (100 * number / total)] if number else ['', '']
        lines.append((line % tuple(cells)).rstrip())
    lines[1:1] = ['-' * len(lines[0])]
    lines += [lines[1], '{:,} parameters, {:,.1f} MiB as float32'.format(totals[0], totals[0] * 4 / 2**20),
              '{:,} multiply-accumulates of weights, {:.2f} GFLOP'.format(totals[1], totals[1] * 2 / 1e9)]
    return '\n'.join(lines)


if __name__ == '__main__':
    print(summary(VGG16()))
