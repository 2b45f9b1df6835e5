"""Make a bundle of the size of T2T-ViT-12, with seeded weights: for benchmarks, where only the cost of a model counts.

    python -m benchmarks.build_bundle --bundle build/t2t-vit-12

Exporting takes a few minutes of one core, once: an existing bundle is only checked. The frontier is calibrated on the
benchmarks' own images; as such a model knows nothing, whether an exit was right is drawn by lot, and accuracies in it
mean nothing. Its records hold the confidences of the images, and thus the thresholds for any mix of exits.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.harness import Options, Report, finish, parse
from benchmarks.offline import know_bundle, thresholds_for
from server.bench.photos import photos
from server.bundle.manifest import Bundle
from server.calibration.sweep import sweep
from server.errors import BundleError

RIGHT = (0.70, 0.78, 0.82)  # drawn by lot: how often the exits are right


def build(path: Path, variant: str, files: list[bytes]) -> Bundle:
    """The bundle at `path`, made where there is none."""
    try:
        return Bundle.load(path)
    except BundleError:
        if (path / "frontier.json").exists():  # a bundle, but a broken one
            raise
    if not path.exists():
        # Heavy, and an extra of the distribution.
        from export.write import export_model, seeded_model

        model = seeded_model(variant)
        export_model(model, path, {"weights": "seeded, not trained"}, lambda step: print(step, file=sys.stderr))
    bundle = Bundle.load(path, need_frontier=False)
    print(f"calibrating on {len(files)} images", file=sys.stderr)
    known = know_bundle(bundle, files)
    exits = len(bundle.manifest.stages)
    right = np.random.default_rng(0).random(len(files)) < np.linspace(RIGHT[0], RIGHT[-1], exits)[:, None]
    manifest = bundle.manifest
    return bundle.write_frontier(sweep(known.confidence[:-1], right, manifest.stage_gmacs, key=manifest.frontier_key))


def main(arguments: list[str] | None = None) -> int:
    options = parse(
        "build_bundle",
        __doc__,
        arguments,
        lambda parser: parser.add_argument("--variant", default="t2t-vit-12", help="a row of model.config.VARIANTS"),
    )
    return finish(measure(options), options)


def measure(options: Options) -> Report:
    if options.bundle is None:
        raise SystemExit("--bundle PATH is needed: the folder to write")
    report = Report("build_bundle")
    began = time.monotonic()
    bundle = build(options.bundle, options.variant, photos(options.images))
    manifest = bundle.manifest
    confidence = bundle.frontier.records.confidence  # (E-1, N)
    thresholds = thresholds_for(confidence, options.mix)
    row = bundle.frontier.predict(thresholds)
    distinct = [len(np.unique(row)) for row in confidence]
    report.add("bundle", f"{manifest.name} {manifest.version}", version=manifest.version)
    report.add("took", f"{time.monotonic() - began:.0f} s")
    report.add("token grids", ", ".join(f"{h}x{w}" for h, w in (s.grid for s in manifest.stages)))
    report.add("cumulative GMAC", ", ".join(f"{g:.3f}" for g in manifest.stage_gmacs), gmacs=manifest.stage_gmacs)
    report.add("operating points", str(len(bundle.frontier.rows)))
    report.add("images", f"{bundle.frontier.samples}, distinct confidences {distinct}", distinct=distinct)
    report.add("thresholds for the mix", ", ".join(f"{t:.9g}" for t in thresholds), thresholds=thresholds)
    report.add("mix of exits", ", ".join(f"{f:.3f}" for f in row.exit_fractions), mix=row.exit_fractions)
    return report


if __name__ == "__main__":
    sys.exit(main())
