"""Adapters for frameworks, installed as ``rag_blockcache.integrations``; each an optional extra."""
