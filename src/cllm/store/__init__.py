"""What is on disk and how it is trusted: run directories, checkpoints, metrics."""
