"""Where a model came from: the chain of manifests back to the source files, its verification, and traces of one row."""

from sft_pipeline.lineage.trace import Trace, trace
from sft_pipeline.lineage.verify import Finding, Verification, verify
from sft_pipeline.lineage.walk import Chain, Node, walk

__all__ = ["Chain", "Finding", "Node", "Trace", "Verification", "trace", "verify", "walk"]
