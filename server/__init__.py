"""Everything that answers requests, without torch. `docs/architecture.md` shows the rooms."""

import os

DISTRIBUTION = "dvt-serve"

# ONNX Runtime tells its maker of every model that it opens, and leaves an id in the user's home, unless it is told not
# to before it is loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def release() -> str:
    """The version of this distribution."""
    from importlib.metadata import PackageNotFoundError, version  # slow to import

    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:  # run from a folder that was not installed
        return "0+unknown"
