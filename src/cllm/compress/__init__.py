"""Compression: codecs for tables and weights."""
