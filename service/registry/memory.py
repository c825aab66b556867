"""Memory that is not used any more."""

import ctypes
import gc


def give_memory_back() -> None:
    """Hand freed memory to the system: glibc keeps what threads that have ended had allocated."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):  # another C library
        return
