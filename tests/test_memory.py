"""Memory that is freed and taken again."""
import os
import platform
import subprocess
import sys

import pytest

from file import memory

# 40 MB are more than the C library ever keeps by itself.
FAULTS = '''
import ctypes
import resource
from file import memory
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)    # PR_SET_THP_DISABLE: pages of 2 MB would make few faults of either way
if %r:
    assert memory.keep_what_is_freed()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b'x' * 40000000
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
'''


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='only glibc is told')
def test_what_is_freed_is_taken_again():
    def faults(keep):
        return int(subprocess.run([sys.executable, '-c', FAULTS % keep], stdout=subprocess.PIPE, check=True,
                                  cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__)))).stdout)

    assert faults(keep=True) < 1000 < faults(keep=False)


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(memory.ctypes, 'CDLL', lambda name: object())
    assert memory.keep_what_is_freed() is False
