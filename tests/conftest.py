"""What every test needs: the project on the import path, and the marks that choose tests."""
import os
import sys

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, PROJECT)

MARKS = {'stage60': 'the network is built and its parameters load',
         'stage80': 'the forward pass is right',
         'stage100': 'the backward pass is right',
         'slow': 'takes more than some seconds: compiles anew, or runs the network with loops that are not fast'}


def pytest_configure(config):
    for mark in MARKS.items():
        config.addinivalue_line('markers', '%s: %s' % mark)
