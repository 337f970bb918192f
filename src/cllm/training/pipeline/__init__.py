"""Training with a delay: forward, backward and optimizer of three batches at once."""
