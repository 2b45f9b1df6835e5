"""Engines run single stages of a cascade; `server.core.Engine` is their contract. `load_engine` makes the choice.

What waits, and why a stage runs, is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence

from server.bundle.manifest import Bundle
from server.core import Engine


def load_engine(bundle: Bundle, *, max_batch_sizes: Sequence[int] | None = None) -> Engine:
    """The engine for a bundle on this machine; `max_batch_sizes` overrides what the engine says pays, per stage.

    Raises BundleError for a bundle that the engine cannot run, ImportError where its runtime is not installed.
    """
    # The runtime is heavy, and an extra of the distribution: imported here, where it is chosen.
    from server.engines.onnx import OnnxEngine

    return OnnxEngine(bundle, max_batch_sizes=max_batch_sizes)
