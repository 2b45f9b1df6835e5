"""BentoML: a batchable API, a worker a core, each with its own adaptive dispatcher."""

import base64
from typing import Any

import bentoml
import cascade


@bentoml.service(
    workers=cascade.WORKERS,
    traffic={"timeout": cascade.TIMEOUT_S},
    logging={"access": {"enabled": False}},
)
class Classify:
    def __init__(self):
        self.stages = cascade.Stages()

    # A dispatcher that expects to exceed its latency answers 503; so this is not the deadline but the patience.
    @bentoml.api(
        route="/classify",
        batchable=True,
        max_batch_size=cascade.BATCH,
        max_latency_ms=round(1000 * cascade.TIMEOUT_S),
    )
    def classify(self, images: list[str]) -> list[dict[str, Any]]:
        answers = self.stages.run_files([base64.b64decode(image) for image in images])
        return [{"error": str(found)} if isinstance(found, ValueError) else found for found in answers]
