"""Makes the rules the PrometheusRule of an operator: python deploy/prometheus/to_kubernetes.py, after every change.

The plain files are the source, so that a Prometheus without an operator, and promtool, read the very rules.
"""

from __future__ import annotations

from pathlib import Path

RULES = Path(__file__).parent / "rules"
TARGET = Path(__file__).parents[1] / "kubernetes" / "components" / "monitoring" / "prometheusrule.yaml"

HEAD = """\
# Made by deploy/prometheus/to_kubernetes.py of the files in deploy/prometheus/rules. Change those.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: dvt-serve
  labels:
    app.kubernetes.io/name: dvt-serve
spec:
  groups:
"""


def prometheus_rule() -> str:
    """The groups of all files, as they stand there, two columns to the right."""
    text = HEAD
    for file in sorted(RULES.glob("*.yaml")):
        groups = file.read_text().partition("\ngroups:\n")[2]
        text += "".join(f"  {line}" if line.strip() else line for line in groups.splitlines(keepends=True))
    return text


if __name__ == "__main__":
    TARGET.write_text(prometheus_rule())
