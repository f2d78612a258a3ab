"""What the C library does with memory that was freed: glibc's settings; elsewhere nothing."""

import ctypes

_libc = ctypes.CDLL(None)
# (malloc.h's number, value): nothing is mapped by itself, nothing trimmed, threads share a heap
_KEEP = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1), "M_ARENA_MAX": (-8, 1)}


def keep_freed():
    """Keep freed memory for what is allocated next, for the rest of this process.

    XLA's CPU client allocates the buffers of a step anew at every call, and glibc asks the kernel
    for blocks of that size and returns them at once: 20,000 page faults a step of vgg, a quarter of
    its time (measured on 2 cores). Small blocks split some that a step could have used again: a
    process then holds two or three steps' buffers (measured), until give_back. To be called before
    JAX starts its threads, which share one heap then.
    """
    if hasattr(_libc, "mallopt"):
        for setting, value in _KEEP.values():
            _libc.mallopt(setting, value)


def give_back():
    """Return what is free to the system now."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)
