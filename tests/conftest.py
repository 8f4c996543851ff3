"""What every test needs: the project on the import path, and the stages of the rubric as markers."""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

STAGES = {'stage60': 'the network is built and its parameters load',
          'stage80': 'the forward pass is right',
          'stage100': 'the backward pass is right'}


def pytest_configure(config):
    for stage in STAGES.items():
        config.addinivalue_line('markers', '%s: %s' % stage)
