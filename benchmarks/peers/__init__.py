"""Other servers beside ours, with the same graphs on the same cores: `python -m benchmarks.peers`."""
