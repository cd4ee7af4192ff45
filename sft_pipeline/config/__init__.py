"""Dataset and recipe files: typed, strict, composed of the stages' own small configurations."""
