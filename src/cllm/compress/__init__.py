"""Compression: calibration, decoders, codecs, and a whole model in one file."""
