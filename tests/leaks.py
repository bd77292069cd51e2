"""A plugin of pytest for make asan (-p leaks): LeakSanitizer looks when the tests are done, while
the library is still loaded and its places in the code have names. What Python itself leaks, which
has none of them, does not change the exit status."""

import ctypes
import gc


def pytest_unconfigure() -> None:
    gc.collect()
    ctypes.CDLL(None).__lsan_do_recoverable_leak_check()
