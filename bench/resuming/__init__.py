"""The parts of kills.py: one attempt at the training, the kills, and what is compared afterwards."""
