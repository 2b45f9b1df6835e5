"""The Dynamic Vision Transformer in PyTorch: architecture, training, evaluation. Knows nothing of the server."""
