"""Measurements: time to first token and FLOPs by length, prefill throughput, peak memory."""
