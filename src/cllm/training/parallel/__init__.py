"""Training by several processes on one machine."""
