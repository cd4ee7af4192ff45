"""The parts of the kill benchmark: the branch that is trained, one attempt, the strikes, and the verdict."""
