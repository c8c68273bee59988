"""Tokens per second of encoding passages, against the same model's own batched forward pass.

    python tests/benchmarks/bench_prefill.py

What: 20,000 tokens of the Python language reference, cut into passages of 60 to 200 tokens, are encoded
with all states kept, then behind as many tokens as stand-ins have, then encoded and written to a disk store
batch by batch, as the job does it. The baseline is the bare decoder (no head, no cache, nothing kept) over
as many tokens in rows of exactly 100, at the best of several batch sizes, which are tried first. The ways
take turns for three rounds after one to warm up; shares of the baseline are taken within a round.
SmolLM2-135M in bfloat16, unless options say otherwise.

How it can mislead: rows of 100 attend to less than passages of up to 200, and need no padding; both
favour the baseline, by little. Bytes written per second are what the job waits for, most of it into the
page cache; ``durable_bytes_per_second`` waits for the disk.

Other models and machines: ``--model FOLDER``, or ``--shape llama-3-8b --device cuda``; ``--help`` has the
rest.
"""

from language_reference import run_bench

if __name__ == "__main__":
    run_bench("prefill", takes_text=True)
