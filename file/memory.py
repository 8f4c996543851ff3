"""Keep the memory that a run frees for its next layer.

Every layer makes arrays of up to 26 MB and drops those of the layer before.  By itself the C library returns memory
that large to the operating system at once, and gets it again for the next layer in pages of 4 KB, each cleared when
it is first touched (tests/test_memory.py counts them).
"""
import ctypes

TRIM_THRESHOLD, MMAP_MAX = -1, -4    # of mallopt, see `man mallopt`


def keep_what_is_freed():
    """Tell the C library so; where it is not glibc nothing is changed.

    Returns
    -------
    bool
        Whether it will.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(MMAP_MAX, 0) and mallopt(TRIM_THRESHOLD, 2**31 - 1))
