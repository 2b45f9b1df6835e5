"""Everything that answers requests, without torch. `docs/architecture.md` shows the rooms."""

DISTRIBUTION = "dvt-serve"


def release() -> str:
    """The version of this distribution."""
    from importlib.metadata import PackageNotFoundError, version  # slow to import

    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:  # run from a folder that was not installed
        return "0+unknown"
