"""Every plot of the pipeline, one module per area. No code version covers them: a plot changes no data."""
