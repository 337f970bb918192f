"""From a ``ModelConfig`` to a network: embeddings, attention, norms, heads."""
