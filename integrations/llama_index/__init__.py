"""LlamaIndex adapter (not part of this release)."""
