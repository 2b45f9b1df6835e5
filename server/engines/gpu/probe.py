"""Whether there is a GPU at all, asked of the driver, before anything large is imported."""

from __future__ import annotations

import ctypes
import sys


def visible_gpus(driver: str = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1") -> int:
    """NVIDIA GPUs that this process may use; 0 also without a driver, and where CUDA_VISIBLE_DEVICES hides all."""
    try:
        cuda = ctypes.CDLL(driver)
        count = ctypes.c_int()
        found = cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0
    except (OSError, AttributeError):
        return 0
    return count.value if found else 0
