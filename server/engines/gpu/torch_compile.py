"""A stage's operators, compiled by torch: what lies between products is joined to few kernels, which read and write the
device's memory less often.

It takes seconds to a minute for each stage and batch size, the first time. What the compiler made is kept in a folder,
and found there at the next start. It is code that runs with the rights of the server: only a folder of this user's is
taken, that nobody else can write to.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from server.engines.gpu.torch_stage import Compile, Kernel
from server.errors import EngineUnavailable

FOLDERS = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}


def compiler(folder: Path | None, backend: Any = "inductor") -> Compile:
    """Keeps what it makes in the folder; None: for this process. Raises EngineUnavailable for a folder that others can
    write to, or that cannot be made."""
    root = (
        Path(tempfile.mkdtemp(prefix="dvt-compiled-"))
        if folder is None
        else _own(folder / f"torch-{torch.__version__}")
    )
    for variable, name in FOLDERS.items():
        os.environ[variable] = str(_own(root / name))  # torch reads them when it compiles

    def compile_(program: Kernel, tensors: Sequence[Tensor]) -> Kernel:
        # Operators as they are called, with shapes and weights as constants: the compiler need not read Python.
        graph = make_fx(program)(*tensors)
        compiled: Kernel = torch.compile(graph, backend=backend, fullgraph=True, dynamic=False)
        compiled(*tensors)  # compiles
        return compiled

    return compile_


def _own(folder: Path) -> Path:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.lstat()
    except OSError as error:
        raise EngineUnavailable(f"compiled stages cannot be kept in {folder}: {error.strerror}") from None
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid() or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise EngineUnavailable(f"{folder}: must be a folder of this user's that nobody else can write to")
    return folder
