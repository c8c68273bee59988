"""OpenAI-compatible server (not part of this release)."""
