"""One room per asset, in graph order: its configuration, its plain functions, its checks."""
