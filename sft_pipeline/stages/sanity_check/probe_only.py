"""The part of the sanity check that depends on data and model alone: labels, vocabulary and the boundary probe."""

from sft_pipeline.stages.sanity_check.asset import PROBE_CHECKS
from sft_pipeline.stages.sanity_check.build import Verdict, judged, probed_copy
from sft_pipeline.stages.sanity_check.config import SanityCheckConfig
from sft_pipeline.stages.stage import Build, Built


def build(b: Build) -> Built:
    return judged(b, Verdict(), PROBE_CHECKS, _probe)


def _probe(b: Build, config: SanityCheckConfig, verdict: Verdict) -> None:
    probed_copy(b, config, verdict)
