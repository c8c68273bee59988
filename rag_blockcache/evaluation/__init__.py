"""Measurements: time to first token and FLOPs by length, prefill throughput, peak memory.

Reading order: ``stopwatch`` and ``environment`` (how and where times are taken), ``shapes`` (random models of
known sizes), ``token_prompts`` (prompts of exact length) and ``requests`` (one request through the stages of
the engine, timed); then what is measured: ``flops``, ``latency`` (with ``page_cache`` for cold disks),
``prefill``, ``memory``.
"""
