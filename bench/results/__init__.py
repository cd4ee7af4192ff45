"""The parts of same_results.py: building one branch with the code of a checkout, and comparing two builds."""
