"""Measurements of a real `dvt serve` process. Each is a script: `python -m benchmarks.<name>` from the root folder."""
