"""Compression: codecs for tables and weights. It rests on the floors below and knows nothing of the roof."""
