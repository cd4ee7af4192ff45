"""The parts of the training benchmark: settings, rows, the sides that are measured, how they take turns, the report."""
