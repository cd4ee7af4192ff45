"""The parts of data_plane.py: rows, the systems that are measured, one measurement, the comparisons."""
