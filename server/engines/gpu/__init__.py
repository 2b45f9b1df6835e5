"""Stages on a GPU: one runtime for all that can run a stage there. `stage` is what the runtime asks of those."""
