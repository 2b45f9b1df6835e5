"""Cost of the exits, counted by fvcore on the network as it runs: multiply-accumulates (MACs), batch 1.

fvcore counts matrix products and convolutions (and one operation an element for normalisations); the paper prints the
same count as "FLOPs".
"""

from __future__ import annotations

import logging
import warnings

import torch

from model.dvt import DVT


def cumulative_macs(model: DVT) -> list[int]:
    """MACs spent up to and including each exit."""
    size = model.config.image_size
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    # fvcore warns about every elementwise operator that it does not count.
    logger = logging.getLogger("fvcore.nn.jit_analysis")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():  # it is built on TorchScript, which PyTorch calls deprecated at every turn
            warnings.simplefilter("ignore")
            from fvcore.nn import FlopCountAnalysis

            per_module = FlopCountAnalysis(model, torch.zeros(1, 3, size, size, device=device)).by_module()
        stages = [int(per_module[f"stages.{i}"]) for i in range(model.config.num_stages)]
    finally:
        logger.setLevel(level)
        model.train(was_training)
    return [sum(stages[: i + 1]) for i in range(len(stages))]
