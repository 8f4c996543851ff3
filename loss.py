"""Softmax cross-entropy, the loss of lab 1."""
import numpy as np
from scipy.special import log_softmax


class CrossEntropy(object):
    """Mean cross-entropy of softmax(logits) against the right classes.

    L = -1/N * sum over n of log softmax(logits_n)[label_n];  dL/dlogits_n = (softmax(logits_n) - onehot_n) / N

    Computed from the logarithm of the softmax, so that no exponential overflows and no logarithm meets a zero,
    however far apart the logits are; and in long double, rounded to float64 at the end: numpy has several exp for
    float64 and takes the one that the processor runs best, and they differ in the last bit.

    Examples
    --------
    >>> loss = CrossEntropy()
    >>> round(loss.forward(np.array([[0., 0., 0., 0.]]), np.array([1])), 6)
    1.386294
    >>> loss.backward()
    array([[ 0.25, -0.75,  0.25,  0.25]])
    """

    def __init__(self):
        self.log_probabilities = None
        self.labels = None

    def forward(self, inputs, labels):
        """The loss.

        Parameters
        ----------
        inputs : ndarray (N, classes), float32 or float64
            Logits.
        labels : ndarray (N,), integers
            The right class of each, 0 <= label < classes.

        Returns
        -------
        float

        Raises
        ------
        ValueError
            For shapes that do not fit and labels out of range.
        TypeError
            For labels that are no integers.
        """
        inputs, labels = np.asarray(inputs), np.asarray(labels)
        if inputs.ndim != 2:
            raise ValueError('inputs: logits of shape (N, classes) expected, got %s' % (inputs.shape,))
        if labels.shape != inputs.shape[:1]:
            raise ValueError('labels: shape %s expected, got %s' % (inputs.shape[:1], labels.shape))
        if not np.issubdtype(labels.dtype, np.integer):
            raise TypeError('labels: integers expected, got %s' % labels.dtype)
        if labels.size and not (0 <= labels.min() and labels.max() < inputs.shape[1]):
            raise ValueError('labels: 0 to %d expected, got %s' % (inputs.shape[1] - 1, labels))
        self.log_probabilities = log_softmax(inputs.astype(np.longdouble), axis=1)
        self.labels = labels
        return float(-self.log_probabilities[np.arange(len(labels)), labels].mean()) if labels.size else 0.0

    def backward(self):
        """Gradient of the logits.

        Returns
        -------
        ndarray (N, classes), float64
            As all that follows on the way back.

        Raises
        ------
        RuntimeError
            Before any forward.
        """
        if self.log_probabilities is None:
            raise RuntimeError('backward needs a forward first: it uses what forward saw')
        grad = np.exp(self.log_probabilities)
        grad[np.arange(len(self.labels)), self.labels] -= 1
        return (grad / max(1, len(self.labels))).astype(np.float64)
