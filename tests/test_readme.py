"""The README tells the truth: its blocks of output are what the commands print, its links and doctests work."""
import doctest
import importlib
import os
import re
import shlex
import subprocess
import sys

import pytest

from conftest import PROJECT


def text_of(name):
    with open(os.path.join(PROJECT, name), encoding='utf-8') as file:
        return file.read()


def consoles():
    """(command, output) of every block that shows a command and what it prints."""
    blocks = re.findall(r'^```console\n(.*?)^```', text_of('README.md'), re.DOTALL | re.MULTILINE)
    assert all(block.startswith('$ ') for block in blocks)
    return [tuple(block[2:].split('\n', 1)) for block in blocks]


# What takes minutes, measures the machine or needs files of the reader's is shown, but not run again here.
CHEAP = [console for console in consoles() if re.match(r'.venv/bin/python (vgg|main)\.py', console[0])]


def alike(line, wanted):
    """Whether two lines are the same but for rounding; the seconds of a run are alone in their line."""
    words, right = line.replace('[', ' ').replace(']', ' ').split(), wanted.replace('[', ' ').replace(']', ' ').split()
    if len(words) != len(right):
        return False
    for word, other in zip(words, right):
        try:
            if len(words) > 1 and abs(float(word) - float(other)) > 1e-5 * abs(float(other)):
                return False
        except ValueError:
            if word != other:
                return False
    return True


@pytest.mark.parametrize('command, output', CHEAP)
def test_a_block_of_output_is_what_the_command_prints(command, output):
    """A line `...` stands for any lines."""
    arguments = shlex.split(command)
    assert arguments[0] == '.venv/bin/python'
    printed = subprocess.run([sys.executable] + arguments[1:], cwd=PROJECT, stdout=subprocess.PIPE).stdout.decode()
    lines, skipping = printed.splitlines(), False
    for wanted in output.splitlines():
        if wanted == '...':
            skipping = True
            continue
        while skipping and lines and not alike(lines[0], wanted):
            del lines[0]
        assert lines and alike(lines.pop(0), wanted), wanted
        skipping = False
    assert skipping or not lines


def test_there_are_blocks_to_run():
    assert len(CHEAP) >= 2


@pytest.mark.parametrize('name', ['README.md', 'file/making/README.md'])
def test_links_and_file_names_exist(name):
    text = text_of(name)
    linked = re.findall(r'\]\((?!http|#)([^)]+)\)', text)
    named = re.findall(r'`((?:file|tests)/[\w./]+)`', text)
    made = {'file/vgg16_ckpt.npy'}
    for path in linked:
        assert os.path.exists(os.path.join(PROJECT, os.path.dirname(name), path)), path
    for path in set(named) - made:
        assert os.path.exists(os.path.join(PROJECT, path)), path


@pytest.mark.parametrize('heading', ['## Run', '## Test'])
def test_run_and_test_have_one_command_each(heading):
    section = text_of('README.md').split('\n' + heading + '\n')[1].split('\n## ')[0]
    commands = re.findall(r'^```bash\n(.*?)\n```', section, re.DOTALL | re.MULTILINE)
    assert len(commands[0].split('\n')) == 1 and commands[0].startswith('python3 -m venv')
    assert '```' not in section.split('```bash')[0]


@pytest.mark.parametrize('module', ['layer', 'loss', 'main', 'file.making.expand'])
def test_examples_in_docstrings(module):
    failed, tried = doctest.testmod(importlib.import_module(module))
    assert failed == 0 and tried > 0
