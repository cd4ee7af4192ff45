"""Supervised fine-tuning as a lineage-tracked asset graph, from raw rows to an exported model."""

__version__ = "0.1.0"
