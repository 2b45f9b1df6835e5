"""Which GPU there is, asked of the driver itself (libcuda).

First of all, and of nobody else: where there is no driver, TensorRT's runtime ends the process with a segmentation
fault instead of an error.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from typing import Any

from server.errors import BundleError

OLDEST_DRIVER = (
    13_000  # the CUDA version that a driver must know, as it tells it: TensorRT and bindings are for CUDA 13
)
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_...


@dataclass(frozen=True, slots=True)
class Gpu:
    """What plans are tied to."""

    name: str
    capability: tuple[int, int]

    @property
    def sm(self) -> str:
        return f"sm{self.capability[0]}{self.capability[1]}"

    @classmethod
    def of_capability(cls, sm: str) -> Gpu:
        """Any GPU of a compute capability, as `sm89`. Raises ValueError."""
        if not (found := re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)", sm.lower())):
            raise ValueError(f"{sm} is no compute capability; for example sm89")
        capability = (int(found[1]), int(found[2]))
        return cls(f"sm{capability[0]}{capability[1]}", capability)


def find_gpu(driver: Any = None) -> Gpu:
    """The first GPU, which is the one that is used: CUDA_VISIBLE_DEVICES says which that is. Raises BundleError, in one
    line, where there is no driver, one that is too old, or no GPU. `driver`: libcuda, which is loaded by default."""
    if driver is None:
        try:
            driver = ctypes.CDLL("libcuda.so.1")
        except OSError:
            raise BundleError("no NVIDIA driver on this machine: libcuda.so.1 cannot be loaded") from None
    version, device, value = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    _call(driver, "cuDriverGetVersion", ctypes.byref(version))
    if version.value < OLDEST_DRIVER:
        raise BundleError(
            f"the NVIDIA driver is too old: it knows CUDA {_cuda(version.value)}, and {_cuda(OLDEST_DRIVER)} is "
            "needed; update it to 580 or newer"
        )
    _call(driver, "cuInit", 0)
    _call(driver, "cuDeviceGet", ctypes.byref(device), 0)
    name = ctypes.create_string_buffer(256)
    _call(driver, "cuDeviceGetName", name, len(name), device)
    capability = []
    for attribute in (_MAJOR, _MINOR):
        _call(driver, "cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
        capability.append(value.value)
    return Gpu(name.value.decode(errors="replace"), (capability[0], capability[1]))


def _call(driver: Any, function: str, *arguments: Any) -> None:
    if code := getattr(driver, function)(*arguments):
        text = ctypes.c_char_p()
        driver.cuGetErrorString(code, ctypes.byref(text))
        why = (text.value or b"unknown error").decode(errors="replace")
        raise BundleError(f"the NVIDIA driver gives no GPU: {function}: {why} ({code})")


def _cuda(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
