"""What every test needs: the project on the import path, the rubric's stages, and a word on what is not written."""
import importlib
import os
import sys

import pytest

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, PROJECT)

import handout    # noqa: E402
from file import once    # noqa: E402

once.compile_once()

STAGES = {'stage60': 'the network is built and its parameters load',
          'stage80': 'the forward pass is right',
          'stage100': 'the backward pass is right'}


def pytest_configure(config):
    for stage in STAGES.items():
        config.addinivalue_line('markers', '%s: %s' % stage)


@pytest.fixture(scope='session', autouse=True)
def say_what_to_write():
    """Let what is still as it was handed out say so, instead of returning what it was given."""
    def saying(what):
        def not_written(*arguments, **options):
            raise NotImplementedError(what)
        return not_written

    for module, owner, name, what in handout.unfinished(PROJECT):
        function = saying(what)
        setattr(getattr(importlib.import_module(module), owner), name,
                function if name == '__init__' else staticmethod(function))
