"""Measurements: times, FLOPs, throughput and memory, and what reuse costs in answers.

Speed, in reading order: ``stopwatch`` and ``environment`` (how and where times are taken), ``shapes`` (random
models of known sizes), ``token_prompts`` (prompts of exact length) and ``requests`` (one request through the
stages of the engine, timed); then what is measured: ``flops``, ``latency`` (with ``page_cache`` for cold
disks), ``prefill``, ``memory``.

Answers, in reading order: ``qa_examples`` (a question with its passages), ``qa_files`` and ``public_sets``
(where they come from), ``variants`` (other passages around them); ``arms``, ``engines`` and ``unmoved`` (what
is compared); ``prefilled`` (prompts of an arm, answered and led along an answer); ``answer_metrics``,
``agreement`` and ``perplexity`` (how it is judged); ``predictions`` (what is kept), ``answer_run`` (the run),
``bootstrap``, ``answer_summary``, ``answer_plots`` and ``answer_page`` (the report); ``answer_options`` and
``answer_evaluation`` (all of it); ``question_writing`` and ``calibration`` (a policy for one's own passages).
"""
