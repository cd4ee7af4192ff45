"""The artifact store: immutable objects addressed by fingerprint, and refs that name the current ones."""

from sft_pipeline.store.artifact import Artifact
from sft_pipeline.store.manifest import FORMAT, FileEntry, InputEntry, Manifest
from sft_pipeline.store.store import Store

__all__ = ["FORMAT", "Artifact", "FileEntry", "InputEntry", "Manifest", "Store"]
