"""Where a model came from: the chain of manifests to the source files, its verification, traces of rows."""

from sft_pipeline.lineage.trace import Trace, trace
from sft_pipeline.lineage.verify import Finding, Verification, verify
from sft_pipeline.lineage.walk import Chain, Node, walk

__all__ = ["Chain", "Finding", "Node", "Trace", "Verification", "trace", "verify", "walk"]
