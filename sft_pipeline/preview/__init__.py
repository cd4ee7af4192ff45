"""The first rows of a dataset, in seconds and without building anything; and a guess of what they are."""
