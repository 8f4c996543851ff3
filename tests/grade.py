"""Grade submissions by the rubric of the lab: 60, 80 or 100.

    python tests/grade.py SUBMISSION... [-j N] [--csv FILE] [--json FILE] [--gradescope FILE]
    python tests/grade.py --table FILE.json... [--csv FILE]

A submission is a folder with a student's layer.py and vgg.py, and main.py and loss.py as far as they are there.  What
is right is computed on the spot, by this package's own network, for a picture that nobody has seen, made of the demo
picture and a random seed, or for secret ones: printing the expected text earns nothing.

    60    the graph of 37 layers is built in order and holds the checkpoint after resume_weights
    80    each layer's forward output is right, and the picture is classified right
    100   the loss's and each layer's gradient are right, down to that of the picture

A result is right if it differs from the expected one by no more than rounding can explain, element by element and
relative to the tensor's sum of magnitudes; where two numbers tie, either way of breaking the tie is right.  After
the first wrong layer every other layer is examined on the right input, so that the report names what is wrong and
not what follows from it.  The score counts the network as a whole.

A submission runs in a process of its own, which is only asked for numbers (grade_judge.py), with limits to its time
and memory, and where bubblewrap is installed (bwrap) in a sandbox that has no network and shows it nothing but Python
and its own copy.  The exit status is 0 for a grading that worked, whatever the scores; 1 if one is below that of
--fail-below; 2 if nothing could be graded.  Linux and macOS; bubblewrap is for Linux.
"""
import argparse
import concurrent.futures
import csv
import glob
import hashlib
import io
import itertools
import json
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time

from grade_process import Box, line_of
from grade_judge import DIRECTIONS, Examination, OutOfTime, Reference

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LARGEST = 1 << 20    # bytes of a file that is still copied; a checkpoint is not
LEFT_OUT = ('.git', '__pycache__', '.pytest_cache', '.venv', 'venv')
STAGES = ((60, 'built and loaded'), (80, 'forward'), (100, 'backward'))


class GradingError(Exception):
    """What keeps all from being graded; the text says what to do."""


def say(text):
    print('grade.py: ' + text, file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------- one submission

def source_of(folder):
    """The folder with vgg.py: the submission itself, or the least deep folder in it that has one."""
    for pattern in ('', '*', os.path.join('*', '*')):
        found = sorted(path for path in glob.glob(os.path.join(glob.escape(folder), pattern, 'vgg.py'))
                       if os.path.realpath(path).startswith(os.path.realpath(folder) + os.sep))    # not of another one
        if found:
            return os.path.dirname(found[0])
    return folder


def files_of(folder):
    """The files of a folder that count, relative to it: no links, nothing large, nothing that a run leaves behind."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in LEFT_OUT)
        for name in sorted(files):
            path = os.path.join(place, name)
            if os.path.isfile(path) and not os.path.islink(path) and os.path.getsize(path) <= LARGEST:
                yield os.path.relpath(path, folder)


def digest(folder):
    """Equal for submissions of the same bytes."""
    found = hashlib.sha256()
    for path in files_of(folder):
        with open(os.path.join(folder, path), 'rb') as file:
            found.update(repr((path, hashlib.sha256(file.read()).hexdigest())).encode('utf-8', 'surrogatepass'))
    return found.hexdigest()


def copy_of(folder, target):
    for path in files_of(folder):
        os.makedirs(os.path.dirname(os.path.join(target, path)), exist_ok=True)
        shutil.copyfile(os.path.join(folder, path), os.path.join(target, path))


def text_of(file):
    """What a process printed: its beginning and its end."""
    file.seek(0)
    text = file.read().decode('utf-8', errors='replace')
    return text if len(text) < 8000 else text[:4000] + '\n...\n' + text[-4000:]


def verdict(examined, pictures):
    """What an examination comes to.

    Returns
    -------
    dict
        score; stages: [points, title, why it was not reached or None]; first_wrong: [direction, layer, why] or None;
        mistake: what explains it, or None; layers: {direction: {layer: why}}, wrong by themselves;
        mistakes: [direction, layer, words]; notes.
    """
    reasons = [examined.built]
    for direction in DIRECTIONS:
        wrong = examined.wrong[direction]
        rights = [examined.passed.get((direction, index)) for index in range(len(pictures))]
        if all(rights):
            reasons.append(None)
        elif wrong:
            reasons.append('%s: %s' % next(iter(wrong.items())))
        else:
            reasons.append('classified wrong' if direction == 'forward' and False in rights else 'not reached')
    count = next((index for index, reason in enumerate(reasons) if reason is not None), len(STAGES))
    first = next(([direction] + list(item) for direction in DIRECTIONS
                  for item in examined.wrong[direction].items()), None)
    return {'score': STAGES[count - 1][0] if count else 0, 'first_wrong': first, 'layers': examined.wrong,
            'mistake': examined.mistakes.get(tuple(first[:2])) if first else None,
            'mistakes': [list(key) + [words] for key, words in examined.mistakes.items()],
            'stages': [[points, title, reason] for (points, title), reason in zip(STAGES, reasons)],
            'notes': list(dict.fromkeys(examined.notes))}


class Grading(object):
    """Of all submissions; processes started in it end with it."""

    def __init__(self, arguments, work, box, reference):
        self.arguments, self.work, self.box, self.reference = arguments, work, box, reference
        self.running, self.stopped = [], threading.Event()

    def grade(self, number, folder):
        """Grade one submission: what verdict says, its seconds, and all that it printed."""
        place, begin = os.path.join(self.work, str(number)), time.monotonic()
        os.makedirs(os.path.join(place, 'home'))
        with tempfile.TemporaryFile() as output:
            def start(**environment):
                if self.stopped.is_set():
                    raise OutOfTime
                self.running.append(self.box.start(place, self.reference.given, number, output, **environment))
                return self.running[-1]

            examined = Examination(self.reference, start, self.arguments.timeout)
            try:
                copy_of(source_of(folder), os.path.join(place, 'submission'))
                examined.examine()
            except OSError as error:
                examined.built = 'cannot be graded: %s' % error
            result = dict(verdict(examined, self.reference.pictures), submission=folder, printed=text_of(output),
                          seconds=round(time.monotonic() - begin, 1), sandbox=bool(self.box.options), like=None)
        shutil.rmtree(place, ignore_errors=True)
        return result

    def stop(self):
        self.stopped.set()
        for process in list(self.running):
            process.end()

    def all(self, jobs):
        """Grade all, those of the same bytes once; return the results in their order."""
        folders, same = self.arguments.submissions, {}
        for folder in folders:
            same.setdefault(digest(source_of(folder)), []).append(folder)
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            waiting = {pool.submit(self.grade, number, alike[0]): alike for number, alike in enumerate(same.values())}
            results = {}
            try:
                for future in concurrent.futures.as_completed(waiting):
                    result = future.result()
                    for folder in waiting[future]:
                        results[folder] = dict(result, submission=folder,
                                               like=result['submission'] if folder != result['submission'] else None)
                    say('%d of %d: %s: %d, %.0f s' % (len(results), len(folders), result['submission'],
                                                      result['score'], result['seconds']))
            except BaseException:
                for future in waiting:
                    future.cancel()
                self.stop()
                raise
        return [results[folder] for folder in folders]


# ------------------------------------------------------------------------------------------------- reports

def report(result, kinds):
    """A graded submission as lines of text."""
    where = '' if result['sandbox'] else ', without a sandbox'
    yield '%s (%.0f s%s)' % (result['submission'], result['seconds'], where)
    if result['like']:
        yield '       the same files as %s' % result['like']
    for points, title, reason in result['stages']:
        yield '%5d  %s: %s' % (points, title, 'yes' if reason is None else 'no: ' + reason)
    mistakes = {(direction, layer): words for direction, layer, words in result['mistakes']}
    if result['first_wrong']:
        direction, layer, why = result['first_wrong']
        words = mistakes.pop((direction, layer), None)
        yield '       first %s: %s, %s%s' % (verb(why), layer, direction, ': ' + words if words else '')
    for direction, kind, found in itertools.product(DIRECTIONS, dict.fromkeys(kinds.values()), ('wrong', 'slow')):
        alike = [name for name in kinds if kinds[name] == kind]
        wrong = [name for name, why in result['layers'][direction].items() if name in alike and verb(why) == found]
        if wrong:
            yield '       %s %s in %d of %d %ss: %s%s' % (direction, found, len(wrong), len(alike), kind,
                                                          ', '.join(wrong[:3]), ', ...' if len(wrong) > 3 else '')
    for (direction, layer), words in mistakes.items():
        yield '       %s, %s: %s' % (layer, direction, words)
    for note in result['notes']:
        yield '       ' + note
    yield 'score: %d' % result['score']


def verb(why):
    return 'slow' if 'slow: ' in why else 'wrong'


def table(results):
    """A line for each submission."""
    width = max(len(result['submission']) for result in results)
    for result in results:
        reason = next((reason for _, _, reason in result['stages'] if reason), '')
        if result['mistake']:
            reason = '%s, %s: %s' % (result['first_wrong'][1], result['first_wrong'][0], result['mistake'])
        if result['like']:
            reason = 'the same files as %s%s' % (result['like'], reason and '; ' + reason)
        yield ('%-*s  %3d  %5.0f s  %s' % (width, result['submission'], result['score'], result['seconds'],
                                         reason)).rstrip()


def write_csv(file, results):
    writer = csv.writer(file)
    writer.writerow(['submission', 'score'] + [title for _, title in STAGES] +
                    ['first wrong layer', 'mistake', 'seconds', 'the same files as'])
    for result in results:
        first, reasons = result['first_wrong'], [reason or 'yes' for _, _, reason in result['stages']]
        writer.writerow([result['submission'], result['score']] + reasons +
                        ['%s, %s' % (first[1], first[0]) if first else '', result['mistake'] or '', result['seconds'],
                         result['like'] or ''])


def gradescope(result, text):
    """What Gradescope reads as results.json: a test for each stage, worth what it adds to the score."""
    tests, before = [], 0
    for points, title, reason in result['stages']:
        tests.append({'name': '%d: %s' % (points, title), 'max_score': points - before, 'output': reason or 'right',
                      'score': points - before if result['score'] >= points else 0})
        before = points
    return {'score': result['score'], 'execution_time': int(result['seconds']), 'output': text, 'tests': tests}


def written(path, write):
    """Write a file that is whole or not there."""
    text = io.StringIO()
    write(text)
    part = path + '.part' if os.path.isfile(path) or not os.path.exists(path) else path    # /dev/stdout is no file
    with open(part, 'w', newline='', encoding='utf-8') as file:
        file.write(text.getvalue())
    if part != path:
        os.replace(part, path)


# ----------------------------------------------------------------------------------------------- the command

def parse(argv):
    parser = argparse.ArgumentParser(description='Grade submissions by the rubric of the lab: 60, 80 or 100.')
    parser.add_argument('submissions', metavar='SUBMISSION', nargs='*', help='a folder with layer.py and vgg.py')
    parser.add_argument('-j', metavar='N', dest='jobs', type=int, default=1,
                        help='grade N submissions at a time; each takes 1 to 2 GB (default: 1)')
    parser.add_argument('--image', metavar='PICTURE', action='append',
                        help='grade on this picture, and not on one made of the demo picture; may be repeated')
    parser.add_argument('--seed', type=int, help='of the made-up picture, to repeat a grading (default: random)')
    parser.add_argument('--ckpt', metavar='PATH', help='a checkpoint (default: the one of this package)')
    parser.add_argument('--timeout', metavar='S', type=float, default=900,
                        help='seconds for a submission, and a quarter of it for each layer (default: 900)')
    parser.add_argument('--memory', metavar='GB', type=float, default=8,
                        help='address space of a submission (default: 8)')
    box = parser.add_mutually_exclusive_group()
    box.add_argument('--sandbox', action='store_true', help='grade in a sandbox or not at all')
    box.add_argument('--no-sandbox', action='store_true', help='do not look for bubblewrap')
    parser.add_argument('--json', metavar='FILE', help='write everything that was found out to a file')
    parser.add_argument('--csv', metavar='FILE', help='write a table to a file')
    parser.add_argument('--gradescope', metavar='FILE', help='write Gradescope\'s results.json, for one submission')
    parser.add_argument('--overwrite', action='store_true', help='write these files where there are some already')
    parser.add_argument('--table', metavar='FILE', nargs='+',
                        help='grade nothing: put together what --json wrote, on one machine or several')
    parser.add_argument('--fail-below', metavar='N', type=float, default=0,
                        help='exit with status 1 if a score is below N')
    parser.add_argument('--package', metavar='FOLDER', default=PROJECT,
                        help='the finished package that says what is right (default: this one)')
    arguments = parser.parse_args(argv)
    if bool(arguments.submissions) == bool(arguments.table):
        parser.error('give submissions, or --table and what --json wrote')
    for folder in arguments.submissions + [arguments.package]:
        if not os.path.isdir(folder):
            raise GradingError('%s: is no folder: give the folder that holds layer.py and vgg.py' % folder)
    for path in arguments.image or []:
        if not os.path.isfile(path):
            raise GradingError('%s: is no file: give a picture' % path)
    if arguments.gradescope and len(arguments.submissions) != 1:
        raise GradingError('--gradescope: is for one submission')
    outputs = [path for path in (arguments.json, arguments.csv, arguments.gradescope) if path]
    for path in outputs:
        if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
            raise GradingError('%s: its folder is not there: make it first' % path)
        if os.path.isdir(path):
            raise GradingError('%s: is a folder: give the name of a file' % path)
        if os.path.isfile(path) and not arguments.overwrite:
            raise GradingError('%s: is there already: give another name, or --overwrite' % path)
    if len(set(map(os.path.realpath, outputs))) < len(outputs):
        raise GradingError('%s: is given twice: give each output a file of its own' % outputs[-1])
    arguments.submissions = list(dict.fromkeys(arguments.submissions))
    return arguments


def graded(arguments):
    """Grade; return the results and the layers' kinds."""
    jobs = max(1, min(arguments.jobs, len(arguments.submissions)))
    work, begin = tempfile.mkdtemp(prefix='grade-'), time.monotonic()
    try:
        box = Box([PROJECT, arguments.package, work] + arguments.submissions, not arguments.no_sandbox,
                  max(1, (os.cpu_count() or 1) // jobs), arguments.memory, arguments.timeout)
        if not box.options:
            if arguments.sandbox:
                raise GradingError('no sandbox: %s: install bubblewrap, or leave out --sandbox' % box.missing)
            say('grading without a sandbox: %s' % ('as told' if arguments.no_sandbox else box.missing))
        paths = arguments.image or [os.path.join(PROJECT, 'file', 'tulips_demo.jpg')]
        seed = None if arguments.image else (
            secrets.randbelow(10**6) if arguments.seed is None else arguments.seed)
        try:
            reference = Reference(os.path.abspath(arguments.package), work, paths, seed,
                                  os.path.abspath(arguments.ckpt) if arguments.ckpt else None)
        except Exception as error:    # the class of a checkpoint's or a picture's error is the package's own
            raise GradingError(str(error) or type(error).__name__)
        say('expected results for %s: %.0f s' % (
            ' and '.join(picture.title for picture in reference.pictures), time.monotonic() - begin))
        return Grading(arguments, work, box, reference).all(jobs), reference.kinds
    finally:
        shutil.rmtree(work, ignore_errors=True)


def gathered(paths):
    """The results of gradings that --json wrote."""
    results = []
    for path in paths:
        try:
            with open(path, encoding='utf-8') as file:
                results += json.load(file)['submissions']
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise GradingError('%s: is not what --json wrote (%s)' % (path, line_of(error)))
    return results


def run(arguments):
    """Grade, or gather, and print reports and, for more than one, a table; return the exit status."""
    if arguments.table:
        results = gathered(arguments.table)
    else:
        results, kinds = graded(arguments)
        texts = ['\n'.join(report(result, kinds)) for result in results]
        print('\n\n'.join(texts) + ('\n' if len(texts) > 1 else ''))
    if arguments.table or len(results) > 1:
        print('\n'.join(table(results)))
    if arguments.json:
        written(arguments.json, lambda file: json.dump({'submissions': results}, file, indent=1))
    if arguments.csv:
        written(arguments.csv, lambda file: write_csv(file, results))
    if arguments.gradescope:
        written(arguments.gradescope, lambda file: json.dump(gradescope(results[0], texts[0]), file, indent=1))
    return 1 if any(result['score'] < arguments.fail_below for result in results) else 0


def main(argv=None):
    """Run the command; return its exit status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)    # what was started has to end with this process
    try:
        return run(parse(argv))
    except GradingError as error:
        say(str(error))
        return 2
    except KeyboardInterrupt:
        say('interrupted')
        return 130


if __name__ == '__main__':
    sys.stdout.reconfigure(errors='backslashreplace')    # a student's message in letters that the console lacks
    sys.exit(main())
