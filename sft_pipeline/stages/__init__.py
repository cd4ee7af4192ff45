"""One package per asset: its configuration, its plain functions, its checks."""
