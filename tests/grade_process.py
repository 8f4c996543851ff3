"""The process that runs a submission: in a sandbox where there is one, with limits, and asked through a socket."""
import glob
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
WORKER = os.path.join(HERE, 'grade_worker.py')
PACKAGES = [path for path in sys.path if os.path.exists(path) and os.path.realpath(path) not in (
    HERE, os.path.dirname(HERE), os.path.realpath(os.curdir))]
SYSTEM = ['/usr', '/bin', '/lib', '/lib32', '/lib64', '/etc/alternatives', '/etc/ld.so.cache', '/etc/localtime',
          '/sys/devices/system/cpu']
USER = 2000000000       # and on: users that no system has, for what root lets run in a sandbox
HEADER = 1 << 16        # bytes of a reply's header, at most
REPLY = 1 << 28         # bytes of a reply's arrays, at most
FILE = 1 << 26          # bytes of a file that a submission writes, at most
FORMS = {'error': str, 'layer': str, 'enter': str, 'loss': float, 'layers': list, 'notes': list, 'has': list}
PROCESSES = 512         # and threads that it has, at most, beside all that run already


class Gone(Exception):
    """A process that gives no usable reply any more; the text says how it ended."""


class Process(object):
    """A student's process (see grade_worker.py)."""

    def __init__(self, command, environment, output):
        self.socket, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(command, stdin=theirs, stdout=output, stderr=output, env=environment,
                                            start_new_session=True)

    def ask(self, seconds, *arrays, **header):
        """Send a request, if there is one, and return the reply: its header, and its arrays."""
        end = time.monotonic() + seconds
        try:
            if header:
                header['arrays'] = [[array.dtype.str, array.shape] for array in arrays]
                line = json.dumps(header).encode()
                self.send(struct.pack('<I', len(line)) + line, end)
                for array in arrays:
                    self.send(np.ascontiguousarray(array).reshape(-1).view(np.uint8), end)
            return self.reply(end)
        except socket.timeout:
            why = 'slow: no result within %.0f s' % seconds
        except (ConnectionError, BrokenPipeError):
            why = self.ending()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            why = 'sent a malformed reply (%s)' % line_of(error)
        raise Gone(why)

    def until(self, end):
        self.socket.settimeout(max(1e-3, end - time.monotonic()))
        return self.socket

    def send(self, content, end):
        content = memoryview(content)
        while content:
            content = content[self.until(end).send(content):]

    def receive(self, size, end):
        content = bytearray(size)
        view = memoryview(content)
        while view:
            count = self.until(end).recv_into(view)
            if not count:
                raise ConnectionError
            view = view[count:]
        return content

    def reply(self, end):
        """A header and arrays, none of them trusted: sizes and dtypes are looked at before anything is read."""
        size, = struct.unpack('<I', self.receive(4, end))
        if size > HEADER:
            raise ValueError('a header of %d bytes' % size)
        header = json.loads(self.receive(size, end).decode())
        arrays, places = header.pop('arrays'), []
        for key, value in header.items():
            if not isinstance(value, FORMS[key]) or isinstance(value, list) and not all(
                    isinstance(part, str) for part in value):
                raise ValueError(line_of(key))
        for dtype, shape in arrays:
            if not re.match('[<>|=]?[fiub][1248]$|[<>|=]?f16$', dtype) or not all(
                    type(length) is int and 0 <= length <= REPLY for length in shape) or len(shape) > 8:
                raise ValueError('an array of %s' % line_of(dtype))
            count = 1
            for length in shape:
                count *= length
            places.append((np.dtype(dtype), tuple(shape), count * np.dtype(dtype).itemsize))
        if sum(size for _, _, size in places) > REPLY:
            raise ValueError('too large: %s' % ' and '.join(str(shape) for _, shape, _ in places))
        return header, [np.frombuffer(self.receive(size, end), dtype).reshape(shape) for dtype, shape, size in places]

    def ending(self):
        """How the process ended, as the submission let go of its end of the socket."""
        try:
            status = self.process.wait(2)
        except subprocess.TimeoutExpired:
            return 'closed its connection'
        number = -status if status < 0 else status - 128    # a shell's and bwrap's way to tell of a signal
        try:
            return 'ended the process by %s' % signal.Signals(number).name
        except ValueError:
            return 'ended the process, exit status %d' % status

    def end(self):
        """End the process and what it started."""
        if self.socket.fileno() < 0:    # done already
            return
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):    # all of them have ended
            pass
        self.process.wait()
        self.socket.close()


def line_of(text, most=400):
    """What a student's process says, as one line that nothing can hide in."""
    return ''.join(c if c.isprintable() else ' ' for c in str(text))[:most]


class Box(object):
    """Where submissions run: starts their processes.

    Parameters
    ----------
    hidden : list of str
        Folders that a submission must not see.
    sandbox : bool
        Whether to look for bubblewrap.
    threads, gigabytes, seconds : of one process
    """

    def __init__(self, hidden, sandbox, threads, gigabytes, seconds):
        self.hidden = {os.path.realpath(path) for path in hidden}
        self.limits = {'memory': int(gigabytes * 2**30), 'file': FILE, 'seconds': seconds * threads + 60}
        self.environment = {key: os.environ[key] for key in ('PATH', 'LD_LIBRARY_PATH') if key in os.environ}
        self.environment.update(LC_ALL='C.UTF-8', MALLOC_ARENA_MAX='2')
        for name in ('NUMBA', 'OMP', 'OPENBLAS', 'MKL'):
            self.environment[name + '_NUM_THREADS'] = str(threads)
        self.options, self.missing = None, 'no bwrap on the path'
        if sandbox and shutil.which('bwrap'):
            self.options = next(filter(self.starts, self.ways()), None)

    def ways(self):
        """The ways to start bwrap: root's own, in which a submission is a user that is not root; then anybody's."""
        alone = ['bwrap', '--die-with-parent', '--unshare-ipc', '--unshare-pid', '--unshare-net', '--unshare-uts',
                 '--cap-drop', 'ALL', '--dev', '/dev']
        user = ['--cap-add', 'CAP_SETUID', '--cap-add', 'CAP_SETGID']
        for own in [user] * (os.getuid() == 0) + [['--unshare-user']]:
            yield alone + own + ['--proc', '/proc']
            yield alone + own    # in a container that lets nobody mount /proc

    def starts(self, options):
        """Whether bwrap starts so, and a Python in it that has its packages."""
        change = 'import os; os.setgroups([]); os.setgid(%d); os.setuid(%d); ' % (USER, USER)
        test = (change if 'CAP_SETUID' in options else '') + 'import sys; sys.path[:] = %r; import numpy' % PACKAGES
        try:
            done = subprocess.run(options + self.visible() + [sys.executable, '-I', '-c', test], env=self.environment,
                                  stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            self.missing = 'bwrap cannot start: %s' % line_of(error)
            return False
        self.missing = 'bwrap cannot start: %s' % line_of(done.stderr.decode(errors='replace').strip())
        return done.returncode == 0

    def visible(self):
        """Options that show Python and its packages, read-only, and of the rest nothing."""
        seen = {path for path in SYSTEM + PACKAGES + [sys.prefix, sys.base_prefix] if os.path.exists(path)}
        seen |= set(map(os.path.realpath, seen))
        options = []
        for path in sorted(seen | self.hidden, key=len):    # what lies in another folder comes after it
            if path not in self.hidden:
                options += ['--dir', os.path.dirname(path), '--ro-bind', path, path]    # bwrap makes folders of root's
            elif any(path.startswith(other + os.sep) for other in seen):
                options += ['--tmpfs', path]
        return options

    def start(self, place, given, number, output, **environment):
        """A process for the submission whose copy is place/submission; it may write there and in place/home."""
        home, submission, worker = os.path.join(place, 'home'), os.path.join(place, 'submission'), WORKER
        command, user = ['/bin/sh', '-c', '"$@"; exit $?', 'sh'], None    # a parent that nobody else needs
        if self.options:
            command = self.options + ['--bind', home, '/tmp'] + self.visible()
            for option, path, name in (('--ro-bind', WORKER, 'worker.py'), ('--ro-bind', given, 'given'),
                                       ('--bind', submission, 'submission')):
                command += ['--dir', '/judged', option, path, '/judged/' + name]
            if 'CAP_SETUID' in command:
                user = USER + number
                for folder, _, files in os.walk(place):
                    for path in [folder] + [os.path.join(folder, name) for name in files]:
                        os.chown(path, user, user, follow_symlinks=False)
            home, worker, given, submission = '/tmp', '/judged/worker.py', '/judged/given', '/judged/submission'
        running = len(glob.glob('/proc/[0-9]*/task/*'))
        limits = dict(self.limits, processes=PROCESSES + running if running else 1 << 20, user=user)
        environment = dict(self.environment, HOME=home, TMPDIR=home, NUMBA_CACHE_DIR=os.path.join(home, 'numba'),
                           **environment)
        command += [sys.executable, '-I', '-u', '-X', 'utf8', worker, submission, given, json.dumps(limits)]
        return Process(command + PACKAGES, environment, output)
