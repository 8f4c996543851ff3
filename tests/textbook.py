"""The handbook's formulas as the plainest loops there are: the specification that layer.py is tested against.

Each function has the arguments and the result of the one in layer.py that it specifies, and reads like the formula
above it.  fastmath is what layer.py has, so that both round alike: the results are compared bit for bit.
"""
import numpy as np
from numba import jit

formula = jit(nopython=True, fastmath={'contract'})


@formula
def conv(inputs_pad, outputs, weight, bias, kernel_size, stride):
    """Y(n, c, h, w) = Bias(c) + sum over k, i, j of Weight(c, k, i, j) * X_pad(n, k, h * S + i, w * S + j)."""
    batch, out_channels, out_height, out_width = outputs.shape
    for n in range(batch):
        for c in range(out_channels):
            for h in range(out_height):
                for w in range(out_width):
                    y = bias[c]
                    for k in range(inputs_pad.shape[1]):
                        for i in range(kernel_size):
                            for j in range(kernel_size):
                                y += weight[c, k, i, j] * inputs_pad[n, k, h * stride + i, w * stride + j]
                    outputs[n, c, h, w] = y
    return outputs


@formula
def conv_back(out_grad, in_grad, weight, kernel_size, stride):
    """in_grad_pad(n, k, h * S + i, w * S + j) collects out_grad(n, c, h, w) * Weight(c, k, i, j)."""
    batch, out_channels, out_height, out_width = out_grad.shape
    for n in range(batch):
        for c in range(out_channels):
            for h in range(out_height):
                for w in range(out_width):
                    for k in range(in_grad.shape[1]):
                        for i in range(kernel_size):
                            for j in range(kernel_size):
                                in_grad[n, k, h * stride + i, w * stride + j] += (
                                    out_grad[n, c, h, w] * weight[c, k, i, j])
    return in_grad


@formula
def pool(outputs, inputs, argidx, kernel_size, stride):
    """Y(n, c, h, w) = max over i, j of X(n, c, h * S + i, w * S + j); argidx = i * K + j of the first maximum."""
    batch, channels, out_height, out_width = outputs.shape
    for n in range(batch):
        for c in range(channels):
            for h in range(out_height):
                for w in range(out_width):
                    largest, index = inputs[n, c, h * stride, w * stride], 0
                    for i in range(kernel_size):
                        for j in range(kernel_size):
                            x = inputs[n, c, h * stride + i, w * stride + j]
                            if x > largest or (np.isnan(x) and not np.isnan(largest)):
                                largest, index = x, i * kernel_size + j
                    outputs[n, c, h, w] = largest
                    argidx[n, c, h, w] = index
    return outputs, argidx


@formula
def pool_back(out_grad, in_grad, argidx, kernel_size, stride):
    """in_grad(n, c, h * S + i, w * S + j) collects out_grad(n, c, h, w), i and j as noted in argidx."""
    batch, channels, out_height, out_width = out_grad.shape
    for n in range(batch):
        for c in range(channels):
            for h in range(out_height):
                for w in range(out_width):
                    i, j = argidx[n, c, h, w] // kernel_size, argidx[n, c, h, w] % kernel_size
                    in_grad[n, c, h * stride + i, w * stride + j] += out_grad[n, c, h, w]
    return in_grad


@formula
def fully_connect(inputs, outputs, weight, bias):
    """Y(n, o) = Bias(o) + sum over i of Weight(o, i) * X(n, i)."""
    for n in range(outputs.shape[0]):
        for o in range(outputs.shape[1]):
            y = bias[o]
            for i in range(inputs.shape[1]):
                y += weight[o, i] * inputs[n, i]
            outputs[n, o] = y
    return outputs


@formula
def fully_connect_back(out_grad, in_grad, weight):
    """in_grad(n, i) = sum over o of out_grad(n, o) * Weight(o, i)."""
    for n in range(in_grad.shape[0]):
        for i in range(in_grad.shape[1]):
            for o in range(out_grad.shape[1]):
                in_grad[n, i] += out_grad[n, o] * weight[o, i]
    return in_grad


@formula
def fully_connect_grad(out_grad, inputs, grad_weight, grad_bias):
    """grad_weight(o, i) = sum over n of out_grad(n, o) * X(n, i); grad_bias(o) = sum over n of out_grad(n, o)."""
    for o in range(out_grad.shape[1]):
        for n in range(out_grad.shape[0]):
            grad_bias[o] += out_grad[n, o]
            for i in range(inputs.shape[1]):
                grad_weight[o, i] += out_grad[n, o] * inputs[n, i]
    return grad_weight, grad_bias


def cross_entropy(logits, labels):
    """L = mean over n of -log(exp(logits(n, label)) / sum over c of exp(logits(n, c))), and its gradient."""
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    right = np.arange(len(labels)), labels
    loss = -np.log(probabilities[right]).mean()
    probabilities[right] -= 1
    return loss, probabilities / len(labels)
