"""What a real TensorRT module has of the classes that are used, as it says itself: names, and arguments of functions.

    python -m tests.server.engines.tensorrt.list_api FOLDER    # writes FOLDER/<module>-<version>.json

for `tensorrt_rtx` and for `tensorrt_bindings`, where they are installed. The latter, which is all of `tensorrt` but its
libraries, comes from PyPI with `pip install --no-deps tensorrt-cu13-bindings==VERSION` (a megabyte; without --no-deps
of another package, pip would fetch gigabytes). Its libraries need not be there: empty ones do, made with a C compiler.
"""

from __future__ import annotations

import ctypes
import inspect
import json
import re
import subprocess
import sys
import tempfile
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from server.engines.tensorrt import api

BASES = ("ILogger", "IProgressMonitor")
CLASSES = [name for name, kind in vars(api).items() if isinstance(kind, type) and kind.__module__ == api.__name__]
USED = sorted({*CLASSES, *api.ENUMERATED, *BASES} - {"TensorRT"})
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)


def load(name: str) -> ModuleType | None:
    """The module, or None where it is not installed."""
    if find_spec(name) is None:
        return None
    if name == "tensorrt_bindings":
        _stand_in_for_libraries(version("tensorrt-cu13-bindings").partition(".")[0])
    return import_module(name)


def listing(module: ModuleType) -> dict[str, Any]:
    classes = {name: _members(getattr(module, name)) for name in USED if hasattr(module, name)}
    return {"version": module.__version__, "classes": classes}


def _members(kind: type) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for name in dir(kind):
        if name.startswith("_") and name != "__init__":
            continue
        member = inspect.getattr_static(kind, name)
        members[name] = _arguments(name, getattr(kind, name).__doc__ or "") if callable(member) else None
    return members


def _arguments(function: str, doc: str) -> list[str]:
    """Of each overload, as "network, config", without self; those with a default end in =."""
    found = []
    for arguments in re.findall(rf"^(?:\d+\. )?{function}\((.*)\) -> ", doc, re.M):
        named = re.findall(
            r"(\w+): [^,=]*(=?)", re.sub("<.*?>", "", arguments)
        )  # a default may be <Strategy.STATIC: 0>
        found.append(", ".join(f"{name}{default}" for name, default in named if name != "self"))
    return found


def _stand_in_for_libraries(major: str) -> None:
    source = "".join(f"int {function}(void) {{ return 0; }}\n" for function in FUNCTIONS)
    with tempfile.TemporaryDirectory() as folder:
        for library in LIBRARIES:
            name = f"lib{library}.so.{major}"
            command = ["cc", "-shared", f"-Wl,-soname,{name}", "-o", f"{folder}/{name}", "-x", "c", "-"]
            subprocess.run(command, input=source, text=True, check=True)
            ctypes.CDLL(f"{folder}/{name}", mode=ctypes.RTLD_GLOBAL)


def main() -> None:
    for name, called in (("tensorrt_rtx", "tensorrt_rtx"), ("tensorrt_bindings", "tensorrt")):
        if module := load(name):
            found = listing(module)
            file = Path(sys.argv[1]) / f"{called}-{found['version']}.json"
            classes = ",\n".join(f"{json.dumps(name)}: {json.dumps(of)}" for name, of in found["classes"].items())
            file.write_text(f'{{"version": {json.dumps(found["version"])}, "classes": {{\n{classes}\n}}}}\n')
            print(file)


if __name__ == "__main__":
    main()
