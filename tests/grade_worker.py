"""The student's side of a grading: does what the judge asks, one request after another, and judges nothing.

    python -I tests/grade_worker.py SUBMISSION GIVEN LIMITS PATH...

Started by grade_process.py, with a socket as standard input.  SUBMISSION is a copy of a student's folder, GIVEN has
the checkpoint and the pictures, LIMITS are the arguments of limit in JSON, and each PATH is a folder with packages.

A message, either way, is the length of a header, the header, a line of JSON, and the bytes of the arrays that it tells
of.  This process holds no expected number.  Whatever a submission does to it, it comes to nothing but other numbers.
"""
import ast
import json
import os
import socket
import struct
import sys
import traceback
import types

LONGEST = 300    # characters of an error message; numba's fill pages


class Stop(BaseException):
    """Ends a pass through the network that the judge has seen enough of."""


def limit(memory, file, seconds, processes, user):
    """Bound what this process may take, for good, before it runs anything of the submission."""
    import resource
    if user is not None:    # in a sandbox that root made: no process limit holds for root
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    for kind, most in (('AS', memory), ('FSIZE', file), ('CPU', seconds), ('NPROC', processes), ('CORE', 0)):
        try:
            kind = getattr(resource, 'RLIMIT_' + kind)
            hard = resource.getrlimit(kind)[1]
            most = int(most) if hard == resource.RLIM_INFINITY else min(int(most), hard)
            resource.setrlimit(kind, (most, most))
        except (AttributeError, ValueError, OSError):    # a system that has no such limit
            pass


def account(error):
    """An exception in one line: where in the submission, which, what."""
    here = os.getcwd() + os.sep
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        frames.append((error.filename, error.lineno))
    mine = [(filename[len(here):], line) for filename, line in frames if filename and filename.startswith(here)]
    place = '%s line %s: ' % mine[-1] if mine else ''
    text = ' '.join((error.msg if isinstance(error, SyntaxError) else str(error)).split())
    return (place + type(error).__name__ + (': ' + text if text else ''))[:LONGEST]


def definitions(path):
    """What a main.py defines: its imports, functions, classes and constants, without running its script."""
    with open(path, 'rb') as file:
        tree = ast.parse(file.read(), path)
    defining = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    tree.body = [node for node in tree.body if isinstance(node, defining) or isinstance(node, ast.Assign) and all(
        isinstance(call.func, ast.Attribute) and call.func.attr == 'array'
        for call in ast.walk(node.value) if isinstance(call, ast.Call))]
    module = types.ModuleType('submitted_main')
    module.__file__ = path
    exec(compile(tree, path, 'exec'), module.__dict__)
    return module


class Probe(object):
    """Stands for a layer in the submission's graph, and shows the judge what comes out of it."""

    def __init__(self, student, name):
        self.student, self.name = student, name

    def forward(self, inputs):
        return self.student.shown(self.name, 'forward', inputs)

    def backward(self, out_grad):
        return self.student.shown(self.name, 'backward', out_grad)


class Student(object):
    """The submission, as far as it was asked for."""

    def __init__(self, given, channel):
        self.given, self.channel = given, channel
        self.network, self.layers, self.has = None, {}, {}

    # -------------------------------------------------------------------------------------------- messages

    def receive(self):
        """A request: its header, and the arrays that came with it, which may be overwritten."""
        size, = struct.unpack('<I', self.channel.read(4))
        header = json.loads(self.channel.read(size).decode())
        arrays = [np.frombuffer(bytearray(self.channel.read(int(np.prod(shape)) * np.dtype(dtype).itemsize)),
                                dtype).reshape(shape) for dtype, shape in header['arrays']]
        return header, arrays

    def send(self, arrays=(), **header):
        header['arrays'] = [[array.dtype.str, array.shape] for array in arrays]
        line = json.dumps(header).encode()
        self.channel.write(struct.pack('<I', len(line)) + line)
        for array in arrays:
            self.channel.write(np.ascontiguousarray(array).tobytes())
        self.channel.flush()

    def reply(self, result, **header):
        """Send what a layer returned, or say that it is no array."""
        if not isinstance(result, np.ndarray):
            self.send(error='returns %s, not an array' % type(result).__name__, **header)
        elif result.dtype.kind not in 'fiub':
            self.send(error='returns an array of %s' % result.dtype, **header)
        else:
            self.send([result], **header)

    def shown(self, name, direction, given):
        """Run a layer within a pass, show its result, and return it, or what the judge has in its place."""
        self.send(enter=name)
        try:
            result = getattr(self.layers[name], direction)(given)
        except (Exception, SystemExit) as error:
            self.send(layer=name, error=account(error))
        else:
            self.reply(result, layer=name)
        header, arrays = self.receive()
        if header['do'] != 'go on':
            raise Stop
        return arrays[0] if arrays else result

    # -------------------------------------------------------------------------------------------- requests

    def make(self):
        """The network: the names of its layers, and of what each is."""
        from vgg import VGG16
        self.network = VGG16()
        self.layers = dict(self.network.graph_layers)
        self.send(layers=[' '.join([name] + [base.__name__ for base in type(layer).__mro__])
                          for name, layer in self.network.graph_layers.items()])

    def load(self, parameters):
        """Give the network the checkpoint, its arrays mapped, which may be overwritten."""
        ckpt = {name: {key: np.asarray(np.load(os.path.join(self.given, file), 'c')) for key, file in files.items()}
                for name, files in parameters.items()}
        try:
            self.network.resume_weights(ckpt)
        except AssertionError as error:    # of load_params, which does not know the layer's name
            shapes = [(name, np.shape(getattr(self.layers[name], 'weight', ())), ckpt[name]['weight'].shape)
                      for name in ckpt]
            wrong = [found for found in shapes if found[1] != found[2]][:1]
            self.send(error=''.join('%s has a weight of shape %s, the checkpoint %s: ' % found for found in wrong) +
                      account(error))
        else:
            self.send()

    def held(self, places, layer, key, shape):
        """Some numbers of all arrays in a layer that have a parameter's shape, or its transpose."""
        layer = self.layers[layer]
        arrays = [array for array in [getattr(layer, key, None)] + list(vars(layer).values())
                  if isinstance(array, np.ndarray)]
        self.send([form.reshape(-1)[places] for array in arrays for form in (array, array.T)
                   if list(form.shape) == shape])

    def names(self):
        """What main.py, layer.py and loss.py define, and notes on what cannot be had."""
        found, notes = [], []
        for module in ('main', 'layer', 'loss'):
            try:
                found.append(definitions(os.path.abspath('main.py')) if module == 'main' else __import__(module))
            except (Exception, SystemExit) as error:
                notes.append('%s.py: %s' % (module, account(error)))
        self.has = {name: getattr(module, name) for name in ('process_image', 'CrossEntropy')
                    for module in reversed(found) if hasattr(module, name)}
        if 'CrossEntropy' in self.has and not os.path.exists('loss.py'):    # as in the course's older edition
            notes = [note for note in notes if not note.startswith('loss.py')]
        return notes

    def look(self):
        self.send(notes=self.names(), has=list(self.has))

    def named(self, name):
        if not self.has:
            self.names()
        return self.has[name]

    def process_image(self, picture):
        self.reply(self.named('process_image')(os.path.join(self.given, picture)))

    def one_pass(self, given, direction):
        """The network's own forward or backward, each layer shown to the judge."""
        self.network.graph_layers = {name: Probe(self, name) for name in self.layers}
        try:
            result = getattr(self.network, direction)(given)
        finally:
            self.network.graph_layers = dict(self.layers)
        self.reply(result)

    def layer(self, given, direction, layer):
        """One layer of the network, by itself."""
        self.reply(getattr(self.layers[layer], direction)(given))

    def new_layer(self, inputs, out_grad, *parameters, **header):
        """A new layer of the kind of one in the network: forward, then backward."""
        layer = type(self.layers[header['layer']])(*header['arguments'])
        if parameters:
            layer.load_params(*parameters)
        arrays, error = [], {}
        try:
            for direction, given in (('forward', inputs), ('backward', out_grad)):
                arrays.append(np.asarray(getattr(layer, direction)(given)).copy())
        except (Exception, SystemExit) as wrong:
            error['error'] = account(wrong)
        self.send([array for array in arrays if array.dtype.kind in 'fiub'], **error)

    def cross_entropy(self, logits, labels):
        loss = self.named('CrossEntropy')()
        value = np.mean(loss.forward(logits, labels))
        self.reply(loss.backward(), loss=float(value))

    def answer(self):
        header, arrays = self.receive()
        do = getattr(self, header.pop('do'))
        del header['arrays']
        try:
            do(*arrays, **header)
        except Stop:
            self.send()
        except (Exception, SystemExit) as error:
            self.send(error=account(error))


def main(submission, given, limits, *paths):
    limit(**json.loads(limits))
    os.chdir(submission)
    sys.path[:] = [os.getcwd()] + list(paths)
    sys.argv[:] = ['main.py']
    sys.dont_write_bytecode = True
    global np
    import numpy as np
    channel = socket.socket(fileno=os.dup(0)).makefile('rwb')
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    student = Student(given, channel)
    while True:
        try:
            student.answer()
        except struct.error:    # the judge has no more requests
            return


if __name__ == '__main__':
    main(*sys.argv[1:])
