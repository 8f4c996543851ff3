"""The layers of VGG16: forward, backward.  Four loops are yours to write: look for TODO."""
import numpy as np
from numba import jit


class ConvolutionLayer(object):
    def __init__(self, in_channels, out_channels, kernel_size, padding=0, stride=1):
        # 输入、输出各有几个平面 / planes read and planes written
        self.in_channels = in_channels
        self.out_channels = out_channels
        # 窗口的边长 / side of the square window
        self.kernel_size = kernel_size
        # 窗口每次移动几格 / how far the window moves
        self.stride = stride
        # 平面四周补几圈零 / rows and columns of zeros around a plane
        self.padding = padding

        # 权重 / weights
        self.weight = np.random.normal(loc=0.0, scale=0.01,
                                       size=(self.out_channels, self.in_channels, self.kernel_size, self.kernel_size))

        # 每个输出平面一个偏置 / one bias for each plane written
        self.bias = np.zeros([self.out_channels])

        # 上一次输入的形状，留给反向传播 / shape of the last inputs, for backward
        self.input_shape = None

    def forward(self, inputs):
        # 记下形状 / note the shape (N, C, H, W)
        self.input_shape = inputs.shape
        batch, channel, height, width = inputs.shape

        # 补零之后的高和宽 / height and width with the frame of zeros
        pad_height = height + self.padding * 2
        pad_width = width + self.padding * 2

        # 把输入放进零框的中间 / put the inputs into the frame
        inputs_pad = np.zeros((batch, channel, pad_height, pad_width), dtype=inputs.dtype)
        inputs_pad[:, :, self.padding:height + self.padding, self.padding:width + self.padding] = inputs

        # 输出的高和宽 / height and width of the outputs
        out_height = int((pad_height - self.kernel_size) / self.stride + 1)
        out_width = int((pad_width - self.kernel_size) / self.stride + 1)
        outputs = np.zeros((batch, self.out_channels, out_height, out_width), dtype=inputs.dtype)

        # 公式本身 / the formula itself
        outputs = self._conv(inputs_pad, outputs, self.weight, self.bias, self.kernel_size, self.stride)
        return outputs

    def backward(self, out_grad):
        # 由上一次输入的形状得出零框的大小 / the frame's size follows from the shape of the last inputs
        batch, channel, height, width = self.input_shape
        pad_height = height + self.padding * 2
        pad_width = width + self.padding * 2

        # 连同零框的输入梯度 / the gradient of the inputs in their frame
        in_grad = np.zeros((batch, channel, pad_height, pad_width))

        # 公式本身 / the formula itself
        in_grad = self._conv_back(out_grad, in_grad, self.weight, self.kernel_size, self.stride)

        # 去掉零框 / cut the frame off
        in_grad = in_grad[:, :, self.padding:height + self.padding, self.padding:width + self.padding]
        return in_grad

    def load_params(self, weight, bias):
        assert self.weight.shape == weight.shape
        assert self.bias.shape == bias.shape
        self.weight = weight
        self.bias = bias

    @staticmethod
    @jit(nopython=True)
    def _conv(inputs_pad, outputs, weight, bias, kernel_size, stride):
        # TODO: 根据公式编写下列代码 请用for循环实现 / write the formula with for loops
        in_channels = inputs_pad.shape[1]
        batch, out_channels, out_height, out_width = outputs.shape

        return outputs

    @staticmethod
    @jit(nopython=True)
    def _conv_back(out_grad, in_grad, weight, kernel_size, stride):
        # TODO: 根据公式编写下列代码 请用for循环实现 / write the formula with for loops
        in_channels = in_grad.shape[1]
        batch, out_channel, out_height, out_width = out_grad.shape

        return in_grad


class MaxPoolLayer(object):
    def __init__(self, kernel_size=2, stride=2):
        # 窗口的边长 / side of the square window
        self.kernel_size = kernel_size
        # 窗口每次移动几格 / how far the window moves
        self.stride = stride
        # 最大值在窗口里的位置，留给反向传播 / where in its window each maximum was, for backward
        self.argidx = None
        # 输入的形状 / shape of the last inputs
        self.input_shape = None
        # 输出的形状 / shape of the last outputs
        self.output_shape = None

    def forward(self, inputs):
        batch, channel, height, width = inputs.shape

        # 输出的高和宽 / height and width of the outputs
        out_height = int((height - self.kernel_size) / self.stride + 1)
        out_width = int((width - self.kernel_size) / self.stride + 1)
        outputs = np.zeros((batch, channel, out_height, out_width), dtype=inputs.dtype)

        # 记下形状，准备索引 / note the shapes, make room for the indices
        self.input_shape = inputs.shape
        self.output_shape = outputs.shape
        self.argidx = np.zeros_like(outputs, dtype=np.int32)

        # 公式本身 / the formula itself
        outputs, self.argidx = self._pool(outputs, inputs, self.argidx, self.kernel_size, self.stride)
        return outputs

    def backward(self, out_grad):
        # 输入的梯度，先全为零 / the gradient of the inputs, zeros at first
        in_grad = np.zeros(self.input_shape)

        # 公式本身 / the formula itself
        in_grad = self._pool_back(out_grad, in_grad, self.argidx, self.kernel_size, self.stride)
        return in_grad

    @staticmethod
    @jit(nopython=True)
    def _pool(outputs, inputs, argidx, kernel_size, stride):
        # TODO: 根据公式编写下列代码 请用for循环实现 / write the formula with for loops
        batch, channel, out_height, out_width = outputs.shape

        return outputs, argidx

    @staticmethod
    @jit(nopython=True)
    def _pool_back(out_grad, in_grad, argidx, kernel_size, stride):
        # TODO: 根据公式编写下列代码 请用for循环实现 / write the formula with for loops
        batch, channel, out_height, out_width = out_grad.shape

        return in_grad


class FlattenLayer(object):
    def __init__(self):
        self.input_shape = None

    def forward(self, inputs):
        # (N, C, H, W) -> (N, C * H * W)
        self.input_shape = inputs.shape
        batch, channel, height, width = inputs.shape
        return inputs.reshape((batch, channel * height * width))

    def backward(self, grad):
        return grad.reshape(self.input_shape)


# 实验一的两个算子 / the two layers of lab 1

class ReluLayer(object):
    def __init__(self):
        # 哪些输入大于 0 / which inputs were larger than 0
        self.positive = None

    def forward(self, inputs):
        self.positive = inputs > 0
        return np.maximum(inputs, 0)

    def backward(self, out_grad):
        return out_grad * self.positive


class FullyConnectLayer(object):
    def __init__(self, in_features, out_features):
        self.weight = np.random.normal(loc=0.0, scale=0.01, size=(out_features, in_features))
        self.bias = np.zeros([out_features])
        # 留给梯度 / for the gradients
        self.inputs = None
        self.out_grad = None

    def forward(self, inputs):
        self.inputs = inputs
        outputs = np.zeros((len(inputs), len(self.bias)), dtype=inputs.dtype)
        return self._connect(inputs, outputs, self.weight, self.bias)

    def backward(self, out_grad):
        self.out_grad = out_grad
        return self._connect_back(out_grad, np.zeros(self.inputs.shape), self.weight)

    def load_params(self, weight, bias):
        assert self.weight.shape == weight.shape
        assert self.bias.shape == bias.shape
        self.weight = weight
        self.bias = bias

    @property
    def grad_weight(self):
        return self.out_grad.T.dot(self.inputs)

    @property
    def grad_bias(self):
        return self.out_grad.sum(axis=0)

    def update_params(self, lr):
        self.weight, self.bias = self.weight - lr * self.grad_weight, self.bias - lr * self.grad_bias

    @staticmethod
    @jit(nopython=True)
    def _connect(inputs, outputs, weight, bias):
        for n in range(outputs.shape[0]):
            for o in range(outputs.shape[1]):
                outputs[n, o] = bias[o]
                for i in range(inputs.shape[1]):
                    outputs[n, o] += weight[o, i] * inputs[n, i]
        return outputs

    @staticmethod
    @jit(nopython=True)
    def _connect_back(out_grad, in_grad, weight):
        for n in range(out_grad.shape[0]):
            for o in range(out_grad.shape[1]):
                for i in range(in_grad.shape[1]):
                    in_grad[n, i] += out_grad[n, o] * weight[o, i]
        return in_grad
