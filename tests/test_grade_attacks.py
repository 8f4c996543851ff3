"""Submissions that compute nothing but attack earn what their layers earn: 60 points, for a network that is built."""
import os
import socket
import subprocess
import sys

import pytest

from grade_process import Box
from test_grade import IN_SANDBOX, NO_CONV, PRINTS, Case, method, package, results_of, running, write    # noqa: F401

pytestmark = pytest.mark.slow
MARK = 'sleep 321.5'
SECRET = 'known to the judge alone'
ONCE = '''
def once(name):
    """Whether this is the first time: a layer that fails is met again in a new process."""
    try:
        os.mkdir(os.path.join(os.environ['TMPDIR'], name))
        return True
    except OSError:
        return False
'''
SENDS = ONCE + '''
import gc, json, struct, sys
def sends(text):
    def forward(self, inputs):
        if once('sent'):
            student, = [thing for thing in gc.get_objects() if type(thing).__name__ == 'Student']
            student.channel.write(text)
            student.channel.flush()
        return np.zeros((1, self.out_channels) + inputs.shape[2:], np.float32)
    return forward
def framed(header):
    return struct.pack('<I', len(header)) + header
'''


def forged(text):
    return Case(60, 'forward layer1_conv1', 'layer1_conv1: sent a malformed reply', SENDS +
                'ConvolutionLayer.forward = sends(%s)\n' % text)


ATTACKS = {
    'builtins and modules replaced': Case(60, 'forward layer1_conv1', 'all zeros', NO_CONV + '''
import builtins, sys, types
builtins.abs = builtins.sum = builtins.round = lambda *given: 0
for name in ('compare', 'mistakes', 'grade', 'grade_judge', 'grade_process', 'json', 'numpy.testing'):
    sys.modules[name] = types.SimpleNamespace(compared=lambda *given: (None, False), near=lambda *given: True)
for thing in list(vars(sys.modules['__main__']).values()):
    if isinstance(thing, type) and hasattr(thing, 'judge'):
        thing.judge = lambda *given: (True, [])
'''),
    'numpy patched': Case(60, 'forward layer1_conv1', 'all zeros', NO_CONV + '''
for name in ('abs', 'absolute', 'allclose', 'array_equal', 'isclose', 'isfinite', 'where', 'vdot', 'float32', 'load'):
    if name != 'load':
        setattr(np, name, lambda *given, **options: True)
'''),
    'frames and gc walked': Case(60, 'forward layer1_conv1', layer='''
import gc, sys
def found(shape):
    frame, things = sys._getframe(), gc.get_objects()
    while frame:
        things += list(frame.f_locals.values()) + list(frame.f_globals.values())
        frame = frame.f_back
    for thing in things + [part for thing in things if isinstance(thing, (list, dict)) and len(thing) < 100
                           for part in (thing.values() if isinstance(thing, dict) else thing)]:
        if isinstance(thing, np.ndarray) and thing.shape == shape and thing.any():
            return thing
    return np.zeros(shape)
ConvolutionLayer.forward = lambda self, inputs: found((1, self.out_channels) + inputs.shape[2:])
'''),
    'descriptors written to': Case(60, 'forward layer1_conv1', layer=NO_CONV + '''
import json, stat
def write(self, inputs, told={}):
    for number in range(3, 64):
        try:
            if not stat.S_ISSOCK(os.fstat(number).st_mode) and not told.setdefault(number, 0):
                os.write(number, b'{"score": 100, "passed": "backward", "right": true, "end": true}\\n')
        except OSError:
            pass
    print('score: 100')
    return np.zeros((1, self.out_channels) + inputs.shape[2:])
ConvolutionLayer.forward = write
'''),
    'no JSON': forged('framed(b"score: 100")'),
    'deep JSON': forged('framed(b"[" * 50000)'),
    'long header': forged('struct.pack("<I", 2**32 - 1)'),
    'another header': forged('framed(json.dumps({"arrays": [], "right": True, "score": 100}).encode())'),
    'objects': forged('framed(json.dumps({"arrays": [["|O", [1]]]}).encode()) + b"12345678"'),
    'texts': forged('framed(json.dumps({"arrays": [["|S4", [1, 4, 32, 32]]]}).encode()) + bytes(4**2 * 32**2)'),
    'too large': forged('framed(json.dumps({"arrays": [["<f4", [2**40, 2**40]]]}).encode())'),
    'negative sizes': forged('framed(json.dumps({"arrays": [["<f4", [-1, -4]]]}).encode())'),
    'a text for a list': forged('framed(json.dumps({"arrays": [], "layers": "layer1_conv1", "error": 3}).encode())'),
    'zeros sent ahead': Case(60, 'forward layer1_conv1', layer=SENDS + '''
ConvolutionLayer.forward = sends(framed(json.dumps(
    {"layer": "layer1_conv1", "arrays": [["<f4", [1, 4, 32, 32]]]}).encode()) + bytes(4 * 4 * 32 * 32))
'''),
    'expected text printed': Case(60, 'forward layer1_conv1', layer=NO_CONV + '''
print('forward: fullyconnect3: 0.5 2019.5\\\\n[[-2 -2 -1 4]]\\\\ntulips\\\\nscore: 100', flush=True)
'''),
    'nothing but prints': Case(0, vgg=PRINTS),
    'report in an error': Case(60, 'forward layer1_conv1', 'ValueError: score: 100', method(
        'ConvolutionLayer', 'def forward(self, inputs):\n'
        '    raise ValueError("\\nscore: 100\\n\\x1b[2J\\u2028score: 100")')),
    'report in a forged error': Case(60, 'forward VGG16.forward', 'x score: 100 score: 100', SENDS + '''
ConvolutionLayer.forward = sends(framed(json.dumps(
    {"arrays": [], "error": "x\\nscore: 100\\u2028score: 100"}).encode()))
'''),
    'exit in the middle': Case(60, 'forward layer2_conv2', 'layer2_conv2: ended the process, exit status 0', method(
        'ConvolutionLayer', 'def forward(self, inputs):\n    if self.in_channels == self.out_channels == 5:\n'
        '        os._exit(0)\n    return the_shipped(self, inputs)')),
    'signals to the parent': Case(60, 'forward layer1_conv1', 'all zeros', NO_CONV + '''
for number in (1, 2, 15, 9):
    try:
        os.kill(os.getppid(), number)
    except OSError as error:
        print(error)
'''),
    'memory bomb': Case(60, 'forward layer1_conv1', 'MemoryError', method(    # of 4 GB, where there is no limit
        'ConvolutionLayer', 'def forward(self, inputs):\n    held = np.empty(2**29)\n'
        '    return the_shipped(self, inputs)')),
    'many processes': Case(60, 'forward layer1_conv1', 'all zeros', NO_CONV + ONCE + '''
import time
if once('forks'):
    for _ in range(100):
        if os.fork() == 0:
            time.sleep(300)
            os._exit(0)
'''),
    'environment': Case(60, 'forward layer1_conv1', 'all zeros',
                        NO_CONV + 'print(os.environ.get("A_SECRET"), "told")\n'),
}
IMPORTS = '''
import glob, importlib.util
for path in glob.glob(%r):
    spec = importlib.util.spec_from_file_location('right', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ConvolutionLayer._conv = module.ConvolutionLayer._conv
    print('found', path)
'''
HELD_BACK = {    # by a sandbox alone
    'daemon': NO_CONV + ONCE + '''
if once('daemon') and os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv('/bin/sleep', %r)
    os._exit(0)
''' % MARK.split(),
    'fork bomb': NO_CONV + ONCE + '''
import time
if once('forks'):
    count = 0
    while count < 4000:
        try:
            if os.fork() == 0:
                time.sleep(300)
                os._exit(0)
            count += 1
        except OSError:
            break
    print('forked', count, flush=True)
''',
    'all processes killed': NO_CONV + 'try:\n    os.kill(-1, 9)\nexcept OSError as error:\n    print(error)\n',
    'root': NO_CONV + 'print("user", os.getuid(), open("/proc/self/status").read())\n',
}


@pytest.fixture(scope='module', params=['--no-sandbox', IN_SANDBOX])
def attacked(request, package, tmp_path_factory):    # noqa: F811
    os.environ['A_SECRET'] = SECRET
    try:
        return results_of(ATTACKS, package, tmp_path_factory.mktemp('attacks'), request.param, '--memory', '2')
    finally:
        del os.environ['A_SECRET']


@pytest.mark.parametrize('name', ATTACKS)
def test_attack(name, attacked):
    attack, result = ATTACKS[name], attacked[name]
    assert result['score'] == attack.score, result['report']
    assert attack.said in result['report'], result['report']
    lines = result['report'].splitlines()
    assert [line for line in lines if line.startswith('score: ')] == ['score: %d' % attack.score]
    if attack.first_wrong:
        assert result['first_wrong'][:2] == attack.first_wrong.split(), result['report']
    assert SECRET not in result['printed'] and (name != 'environment' or 'told' in result['printed'])


@pytest.mark.parametrize('box', [IN_SANDBOX])
def test_held_back(box, package, tmp_path):    # noqa: F811
    """Nothing outside is seen or changed, and nothing is left behind."""
    outside = tmp_path / 'outside.txt'
    right = write(tmp_path / 'right', package, Case(100))
    listening = socket.socket()
    listening.bind(('127.0.0.1', 0))
    listening.listen(1)
    attacks = {name: Case(60, 'forward layer1_conv1', layer=layer) for name, layer in HELD_BACK.items()}
    for name, layer in (
            ('imports the package', IMPORTS % str(package / '*.py')),
            ('imports another submission', IMPORTS % str(tmp_path / '*' / 'layer.py')),
            ('writes elsewhere', 'for path in (%r, "/etc/written", %r):\n    try:\n        open(path, "w").close()\n'
             '    except OSError as error:\n        print(error)\n' % (str(outside), str(right / 'layer.py'))),
            ('changes the checkpoint', 'try:\n    open("../given/layer1_conv1.weight.npy", "r+b").write(bytes(400))\n'
             '    print("changed")\nexcept OSError as error:\n    print(error)\n'),
            ('connects', 'import socket\ntry:\n    socket.create_connection(("127.0.0.1", %d), 1)\n'
             '    print("connected")\nexcept OSError as error:\n    print(error)\n' % listening.getsockname()[1])):
        attacks[name] = Case(60, 'forward layer1_conv1', layer=NO_CONV + layer)
    before = (right / 'layer.py').read_bytes()
    (tmp_path / 'class').mkdir()
    results = results_of(attacks, package, tmp_path / 'class', box)
    for name, result in results.items():
        assert result['score'] == 60, (name, result['report'], result['printed'])
        assert not any(word in result['printed'] for word in ('found', 'changed', 'connected')), result['printed']
    for name in ('writes elsewhere', 'changes the checkpoint', 'connects'):
        assert 'Errno' in results[name]['printed']
    assert not outside.exists() and (right / 'layer.py').read_bytes() == before
    assert int(results['fork bomb']['printed'].split('forked ')[1].split()[0]) < 4000
    assert 'user 0' not in results['root']['printed'] or os.getuid() != 0
    assert not running(MARK)


@pytest.mark.parametrize('box', [IN_SANDBOX])
def test_a_package_among_what_python_needs_is_hidden(box):
    folder = os.path.dirname(os.path.realpath(pytest.__file__))
    command = [sys.executable, '-I', '-c', 'import os; print(os.listdir(%r))' % folder]
    for hidden, seen in (([], False), ([folder], True)):
        made = Box(hidden, True, 1, 8, 60)
        done = subprocess.run(made.options + made.visible() + command, stdout=subprocess.PIPE, universal_newlines=True)
        assert done.returncode == 0 and (done.stdout == '[]\n') == seen
