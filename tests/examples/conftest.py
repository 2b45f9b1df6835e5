"""Before Ray is imported: nothing is reported to anybody, nothing listens beyond this machine, and the processes that
Ray starts find the examples. Where there is no Ray, nothing changes for the other tests."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("ray") is not None:
    ROOT = str(Path(__file__).parents[2])
    sys.path.insert(0, ROOT)
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "PYTHONPATH": ROOT}
