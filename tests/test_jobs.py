"""The jobs that threads share: each is done once, and those of a slow thread by the others."""
import numpy as np
import pytest
from numba import get_num_threads, jit, prange

import layer    # not its names: in a layer.py that shares no jobs these tests fail, and no others


@jit(nopython=True, parallel=True)
def count(done):
    """done[job] += 1 for every job."""
    taken = layer._nothing_taken(len(done))
    for index in prange(len(done)):
        job = np.int64(index)
        while True:
            job = layer._next_job(taken, job)
            if job < 0:
                break
            done[job] += 1


@jit(nopython=True, parallel=True)
def wait_for_others(jobs, done, seen):
    """done[0] counts jobs; the first job ends when all others are done, or after many looks.  seen: how many it saw.

    To look is to count, too: a number that it only reads, the compiler would read once.
    """
    taken = layer._nothing_taken(jobs)
    for index in prange(jobs):
        job = np.int64(index)
        while True:
            job = layer._next_job(taken, job)
            if job < 0:
                break
            others, looks = layer._add_one(done, np.int64(0)), np.int64(1)
            if job == 0:
                while others < jobs - 1 and looks < 10**9:
                    others = layer._add_one(done, np.int64(0)) - looks
                    looks += 1
                seen[0] = others


@pytest.mark.parametrize('jobs', [0, 1, 2, 7, 64])
def test_each_job_is_done_once(jobs):
    done = np.zeros(jobs, np.int64)
    for _ in range(2000):
        count(done)
    np.testing.assert_array_equal(done, 2000)


@pytest.mark.skipif(get_num_threads() == 1, reason='one thread only')
def test_jobs_of_a_slow_thread_are_done_by_others():
    jobs, seen = 1000, np.zeros(1, np.int64)
    wait_for_others(jobs, np.zeros(1, np.int64), seen)
    assert seen[0] == jobs - 1
