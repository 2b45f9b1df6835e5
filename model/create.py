"""A model by its name, in one line."""

from __future__ import annotations

import os
from pathlib import Path

from model.config import variant
from model.dvt import DVT
from model.start import read_start, take_weights


def create_model(name: str, checkpoint: str | os.PathLike[str] | None = None, num_classes: int | None = None) -> DVT:
    """A row of the table of variants, in eval mode on the CPU; with `checkpoint`, one of ours or a published one, with
    its weights and its configuration.

    Where the checkpoint has another number of classes than `num_classes`, its heads are replaced by untrained ones.
    Raises ValueError for an unknown name (it tells near ones), and for a checkpoint of another variant; for an unusable
    file CheckpointError, which is one.
    """
    config = variant(name)
    if checkpoint is None:
        return DVT(config if num_classes is None else variant(name, num_classes=num_classes)).eval()
    start = read_start(Path(checkpoint))
    if start.config.name != name:
        raise ValueError(f"{checkpoint} holds {start.config.name}, not {name}")
    model = DVT(start.config)
    take_weights(model, start)
    if num_classes not in (None, start.config.num_classes):
        model.reset_classifier(num_classes)
    return model.eval()
