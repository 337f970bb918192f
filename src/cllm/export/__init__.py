"""Export: a run as files that other programs run, each opened again by the program it is for."""
