"""Crystalline (`cllm`): train, compress and deploy small language models."""

__version__ = "0.1.0"
