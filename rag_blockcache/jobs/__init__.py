"""Offline jobs: documents in, a searchable index and prefilled blocks out."""
