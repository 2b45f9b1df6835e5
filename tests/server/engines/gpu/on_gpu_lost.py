"""Loses a real device, by a kernel that reads where nothing is. For a process of its own."""

from __future__ import annotations

import numpy as np

from server.bundle.manifest import Bundle
from server.core import EngineLost, StageBatch
from server.engines.gpu import torch_stage
from server.engines.gpu.cuda import CudaDevice
from server.engines.gpu.engine import GpuEngine


def lose(folder: str) -> int:
    bundle = Bundle.load(folder, need_frontier=False)
    device = CudaDevice()
    stages = torch_stage.load(bundle, torch_stage.CudaPlace(), [(1, 2)] * 3)
    engine = GpuEngine(bundle, device, stages, name="torch-cuda", runtime="torch")
    pixels = [np.zeros((*engine.input_size, 3), np.uint8)] * 2
    slots = engine.run(StageBatch(1, pixels, [], [2.0, 2.0])).slots
    held = [slot for slot in slots if slot is not None]
    for store in engine._stores:
        for name in store.addresses:
            store.addresses[name] = 1 << 44
    for again in ("at first", "and from then on"):
        try:
            engine.run(StageBatch(2, pixels, held, [0.0, 0.0]))
        except EngineLost as error:
            print("EngineLost", again, error)
        else:
            return 1
    assert engine.slots_in_use == 2
    engine.free(held)
    engine.close()
    return 0
