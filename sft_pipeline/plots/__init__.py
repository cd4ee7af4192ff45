"""Every picture that the pipeline draws. Nothing here is part of a code version: a plot changes no artifact."""
