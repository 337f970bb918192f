"""Generation: sampling and the engine behind ``generate``."""
