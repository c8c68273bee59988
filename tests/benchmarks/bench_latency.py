"""Time to first token by prompt length: full prefill, reuse from memory and from disk, and the floor.

    python tests/benchmarks/bench_latency.py

What: for each length, the same token ids (passages of about 100 tokens of the Python language reference,
and a final block of 50) reach their first token in six ways, which take turns round by round: full
prefill by the bare model; reuse from memory; from disk with files in the page cache and checked before
(``disk``), read for the first time in a process (``disk_first``, checksums included), thrown out of the
page cache (``disk_cold``); and the floor, the final block over a context that is assembled already. Reuse
includes all that the library does at request time (naming blocks, look-up, assembly, the pass, choosing
the token) but tokenizing; ``text_seconds`` in the result includes that too. Medians of five rounds after
one to warm up; ratios are taken within a round. FLOPs count attention over visible slots. SmolLM2-135M in
bfloat16, unless options say otherwise.

How it can mislead: the policy is the paper's ``block``, and full prefill computes something else:
passages that see one another. On a model that was not block-fine-tuned answers suffer, and the column of
the repair policy is what a user of the default waits for. A cold disk is cold for this system only: a
hypervisor, or the disk's own memory, may still hold the files, and the store's SQLite index stays cached.
Random models (``--shape``) take the same time as real ones, and say nothing about answers. On a GPU
``memory`` is the GPU's own, ``host_memory`` the computer's.

Other models and machines: ``--model FOLDER``, or ``--shape llama-3-8b --device cuda``; ``--help`` has the
rest.
"""

from language_reference import run_bench

if __name__ == "__main__":
    run_bench("latency", takes_text=True)
