"""What lies on disk, and what its numbers mean: manifest, frontier, profile. Nothing runs here: no engine, no clock, no
traffic."""
