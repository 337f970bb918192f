"""Weights as points of E8 and of the Leech lattice, in blocks of 8 and 24 columns."""
