"""LangChain adapter (not part of this release)."""
