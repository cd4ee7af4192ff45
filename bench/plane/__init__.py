"""The parts of the data plane benchmark: rows, the sides that are measured, how they are measured, and the report."""
