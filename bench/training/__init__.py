"""The parts of train.py: the setting and its rows, the systems that are measured, the comparison."""
