"""Grade submissions by the rubric of the lab: 60, 80 or 100.

    python tests/grade.py SUBMISSION... [-j N] [--image PICTURE] [--json FILE]

A submission is a folder with a student's layer.py, vgg.py and main.py.  What is right is computed on the spot, by
this package's own network, for the demo picture and a picture made from a random seed, or for secret ones: printing
the expected text earns nothing.

    60    the graph of 37 layers is built in order and holds the checkpoint after resume_weights
    80    each layer's forward output is right, and the picture is classified right
    100   the loss's and each layer's gradient are right, down to that of the picture

A result is right if it differs from the expected one by no more than rounding can explain, element by element and
relative to the tensor's sum of magnitudes; where two numbers tie, either way of breaking the tie is right.  After
the first wrong layer every other layer is examined on the right input, so that the report names what is wrong and
not what follows from it.  The score counts the network as a whole.

Student code runs in a process of its own, in a temporary copy of its folder, with limits to its time and memory.
That keeps mistakes from doing harm; it is no defence against an attacker.
"""
import argparse
import concurrent.futures
import glob
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import handout
from compare import cause

HERE = os.path.dirname(os.path.abspath(__file__))
PROJECT = os.path.dirname(HERE)
LARGEST = 1 << 20    # bytes of a file that is still copied; a checkpoint is not
STAGES = ((60, 'built and loaded'), (80, 'forward'), (100, 'backward'))


class GradingError(Exception):
    """What keeps all from being graded; the text says what to do."""


def say(text):
    print('grade.py: ' + text, file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------- running a process

class Runner(object):
    """Starts processes of their own group, and ends them at their time limit or when the grading is interrupted."""

    def __init__(self, threads):
        self.stopped = threading.Event()
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith('PYTHON')}
        self.environment.update(PYTHONIOENCODING='utf-8', MALLOC_ARENA_MAX='2')
        for name in ('NUMBA', 'OMP', 'OPENBLAS', 'MKL'):
            self.environment[name + '_NUM_THREADS'] = str(threads)

    def run(self, command, output, seconds=None, home=None):
        """Run a script of this folder; return its exit status, or None at the time limit."""
        environment = dict(self.environment)
        if home:
            environment.update(HOME=home, USERPROFILE=home, TMPDIR=home, TEMP=home, TMP=home)
        end = time.time() + (seconds or float('inf'))
        with open(output, 'wb') as file:
            process = subprocess.Popen([sys.executable] + command, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                                       env=environment, start_new_session=True)
        try:
            while process.poll() is None and time.time() < end and not self.stopped.is_set():
                time.sleep(0.05)
            return process.poll()
        finally:
            self.kill(process)

    @staticmethod
    def kill(process):
        """End a process and what it started."""
        try:
            if hasattr(os, 'killpg'):
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
        except (ProcessLookupError, PermissionError):    # all of them have ended
            pass
        process.wait()


def text_of(path, most=4000):
    """What a process printed: its beginning and its end."""
    with open(path, 'rb') as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        text = file.read(most if size > 2 * most else 2 * most)
        if size > 2 * most:
            file.seek(-most, os.SEEK_END)
            text += b'\n...\n' + file.read()
    return text.decode('utf-8', errors='replace')


# ------------------------------------------------------------------------------------------- what is right

def expect(runner, work, arguments):
    """Compute the expected results into a folder, and return what is known of them."""
    folder, output = os.path.join(work, 'expected'), os.path.join(work, 'expected.txt')
    os.mkdir(folder)
    pictures = arguments.image or [os.path.join(PROJECT, 'file', 'tulips_demo.jpg')]
    seed = '' if arguments.image else str(secrets.randbelow(10**6) if arguments.seed is None else arguments.seed)
    start = time.time()
    ckpt = os.path.abspath(arguments.ckpt) if arguments.ckpt else ''
    command = [os.path.join(HERE, 'grade_expect.py'), folder, os.path.abspath(arguments.package), seed, ckpt]
    status = runner.run(command + list(map(os.path.abspath, pictures)), output)
    if status:
        raise GradingError((text_of(output).strip().split('\n') or ['?'])[-1])
    with open(os.path.join(folder, 'expected.json')) as file:
        facts = json.load(file)
    say('expected results for %s: %.0f s' % (
        ' and '.join(picture['title'] for picture in facts['pictures']), time.time() - start))
    return facts


# --------------------------------------------------------------------------------------- one submission

def source_of(folder):
    """The folder with vgg.py: the submission itself, or the least deep folder in it that has one."""
    for pattern in ('', '*', os.path.join('*', '*')):
        found = sorted(glob.glob(os.path.join(glob.escape(folder), pattern, 'vgg.py')))
        if found:
            return os.path.dirname(found[0])
    return folder


def copy_of(folder, package, target):
    """Copy a submission, without what is large, and what the package gives to students and this one did not return."""
    for origin in (folder, package):
        for path in handout.files_of(origin):
            given = path == 'loss.py' or os.path.dirname(path) == 'file' and path.endswith('.py')
            if os.path.getsize(os.path.join(origin, path)) <= LARGEST and (origin == folder or given):
                copied = os.path.join(target, path)
                if not os.path.exists(copied):
                    os.makedirs(os.path.dirname(copied), exist_ok=True)
                    shutil.copyfile(os.path.join(origin, path), copied)


def ending(status, events, timeout):
    """How an examination ended before its end: None, or what to say of it and the direction and layer it was in."""
    if events and events[-1].get('end'):
        return None
    entered = next((event for event in reversed(events) if 'enter' in event), {})
    why = ('stopped at the time limit of %g s' % timeout if status is None else
           'ended the process by signal %d' % -status if status < 0 else 'ended the process, exit status %d' % status)
    return why, entered.get('enter'), entered.get('layer')


def verdict(facts, events, end):
    """Score a submission by what its examination said and how it ended.

    Returns
    -------
    dict
        score; stages: [points, title, why it was not reached or None]; first_wrong: [direction, layer, why] or
        None; layers: {direction: {layer: why}}, wrong by themselves; notes.
    """
    wrong = {'forward': {}, 'backward': {}}
    for event in events:
        if event.get('wrong') and 'layer' in event:
            wrong[event['direction']].setdefault(event['layer'], event['wrong'])
    notes = [event['note'] for event in events if 'note' in event]
    if end:
        why, direction, layer = end
        if layer:
            wrong[direction].setdefault(layer, why)
        else:
            notes.append(why)
    built = next((event for event in events if 'built' in event), {'built': False, 'wrong': end and end[0]})
    passed = {(event['passed'], event['picture']): event['right'] for event in events if 'passed' in event}
    reasons = [built.get('wrong')]
    for direction in ('forward', 'backward'):
        rights = [passed.get((direction, index)) for index in range(len(facts['pictures']))]
        if all(rights):
            reasons.append(None)
        elif wrong[direction]:
            reasons.append('%s: %s' % next(iter(wrong[direction].items())))
        elif direction == 'forward' and False in rights:
            reasons.append('%s: classified wrong' % facts['pictures'][rights.index(False)]['title'])
        else:
            reasons.append('not reached')
    count = next((index for index, reason in enumerate(reasons) if reason is not None), len(STAGES))
    first = next(([direction] + list(item) for direction in ('forward', 'backward')
                  for item in wrong[direction].items()), None)
    return {'score': STAGES[count - 1][0] if count else 0, 'first_wrong': first, 'layers': wrong,
            'stages': [[points, title, reason] for (points, title), reason in zip(STAGES, reasons)],
            'notes': list(dict.fromkeys(notes))}


def grade(runner, work, facts, index, arguments):
    """Grade one submission: what verdict says, its seconds, and all that it said and printed."""
    folder, place = arguments.submissions[index], os.path.join(work, str(index))
    submission, home, events, output = (
        os.path.join(place, name) for name in ('submission', 'home', 'events', 'output'))
    os.makedirs(home)
    open(events, 'w').close()
    open(output, 'w').close()
    start = time.time()
    try:
        copy_of(source_of(folder), arguments.package, submission)
        status = runner.run([os.path.join(HERE, 'grade_worker.py'), os.path.join(work, 'expected'), submission, events,
                             str(arguments.memory)], output, arguments.timeout, home)
        with open(events) as file:
            said = [json.loads(line) for line in file if line.endswith('\n')]
        end = ending(status, said, arguments.timeout)
    except OSError as error:
        said, end = [], ('cannot be copied: %s' % error, None, None)
    result = dict(verdict(facts, said, end), submission=folder, seconds=round(time.time() - start, 1),
                  printed=text_of(output), events=said)
    shutil.rmtree(place, ignore_errors=True)
    return result


def report(result, facts):
    """A graded submission as lines of text."""
    yield '%s (%.0f s)' % (result['submission'], result['seconds'])
    for points, title, reason in result['stages']:
        yield '%5d  %s: %s' % (points, title, 'yes' if reason is None else 'no: ' + reason)
    first = result['first_wrong']
    if first:
        direction, layer, why = first
        numbers = layer in dict(facts['layers']) and why.startswith(('off by', 'some numbers', 'shape'))
        usual = ', usually ' + cause(direction, layer) if numbers else ''
        yield '       first wrong: %s, %s%s' % (layer, direction, usual)
    for direction in ('forward', 'backward'):
        for kind in dict.fromkeys(kind for _, kind in facts['layers']):
            alike = [name for name, other in facts['layers'] if other == kind]
            wrong = [name for name in alike if name in result['layers'][direction]]
            if wrong:
                yield '       %s wrong in %d of %d %ss: %s%s' % (
                    direction, len(wrong), len(alike), kind, ', '.join(wrong[:3]), ', ...' if len(wrong) > 3 else '')
    for note in result['notes']:
        yield '       ' + note
    yield 'score: %d' % result['score']


def parse(argv):
    parser = argparse.ArgumentParser(description='Grade submissions by the rubric of the lab: 60, 80 or 100.')
    parser.add_argument('submissions', metavar='SUBMISSION', nargs='+',
                        help='a folder with layer.py, vgg.py and main.py')
    parser.add_argument('-j', metavar='N', dest='jobs', type=int, default=1,
                        help='grade N submissions at a time; each takes 1 to 2 GB (default: 1)')
    parser.add_argument('--image', metavar='PICTURE', action='append',
                        help='grade on this picture, and not on the demo and a made-up one; may be repeated')
    parser.add_argument('--seed', type=int, help='of the made-up picture, to repeat a grading (default: random)')
    parser.add_argument('--ckpt', metavar='PATH', help='a checkpoint (default: the one of this package)')
    parser.add_argument('--timeout', metavar='S', type=float, default=900, help='seconds a submission (default: 900)')
    parser.add_argument('--memory', metavar='GB', type=float, default=8,
                        help='address space of a submission (default: 8)')
    parser.add_argument('--json', metavar='FILE', help='write everything that was found out to a file')
    parser.add_argument('--package', metavar='FOLDER', default=PROJECT,
                        help='the finished package that says what is right (default: this one)')
    arguments = parser.parse_args(argv)
    for folder in arguments.submissions + [arguments.package]:
        if not os.path.isdir(folder):
            raise GradingError('%s: is no folder: give the folder that holds layer.py and vgg.py' % folder)
    if arguments.json and not os.path.isdir(os.path.dirname(os.path.abspath(arguments.json))):
        raise GradingError('%s: its folder is not there: make it first' % arguments.json)
    if handout.is_handout(arguments.package):
        raise GradingError('%s: is a hand-out, which does not know what is right: '
                           'grade with the whole package' % os.path.abspath(arguments.package))
    return arguments


def run(arguments):
    """Grade all, and print reports and, for more than one, a table."""
    jobs = max(1, min(arguments.jobs, len(arguments.submissions)))
    runner = Runner(max(1, (os.cpu_count() or 1) // jobs))
    work = tempfile.mkdtemp(prefix='grade-')
    results, done = [], 0
    try:
        facts = expect(runner, work, arguments)
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            waiting = [pool.submit(grade, runner, work, facts, index, arguments)
                       for index in range(len(arguments.submissions))]
            try:
                for future in concurrent.futures.as_completed(waiting):
                    done += 1
                    result = future.result()
                    say('%d of %d: %s: %d, %.0f s' % (done, len(waiting), result['submission'], result['score'],
                                                      result['seconds']))
            except BaseException:
                runner.stopped.set()
                for future in waiting:
                    future.cancel()
                raise
        results = [future.result() for future in waiting]
    finally:
        runner.stopped.set()
        shutil.rmtree(work, ignore_errors=True)
    for result in results:
        print('\n'.join(report(result, facts)), end='\n' if len(results) == 1 else '\n\n')
    if len(results) > 1:
        width = max(len(result['submission']) for result in results)
        for result in results:
            reason = next((reason for _, _, reason in result['stages'] if reason), '')
            print(('%-*s  %3d  %5.0f s  %s' % (width, result['submission'], result['score'], result['seconds'],
                                             reason)).rstrip())
    if arguments.json:
        with open(arguments.json + '.part', 'w') as file:
            json.dump({'expected': facts, 'submissions': results}, file, indent=1)
        os.replace(arguments.json + '.part', arguments.json)


def main(argv=None):
    """Run the command; return its exit status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)    # the workers have to end with this process
    try:
        run(parse(argv))
        return 0
    except GradingError as error:
        say(str(error))
        return 2
    except KeyboardInterrupt:
        say('interrupted')
        return 130


if __name__ == '__main__':
    sys.stdout.reconfigure(errors='backslashreplace')    # a student's message in letters that the console lacks
    sys.exit(main())
