"""Peak memory of one answer over 8,000 tokens from disk, in a process of its own.

    python tests/benchmarks/bench_memory.py

What: one process encodes the blocks of a prompt, a fresh one loads the model, notes what is resident, and
answers 16 tokens from the blocks on disk. Counted are all pages resident in that process at the peak,
private memory and mapped files alike (``VmHWM``), less what was resident when the model was loaded; as a
multiple of the bytes of the prompt's keys and values. The bound is 2.2: once as mapped files, once in the
context, a fifth to work with. SmolLM2-135M in bfloat16, unless options say otherwise.

How it can mislead: mapped files are clean pages, which the system takes back when it needs them, so a
process with less memory would run as well. What libraries allocate at their first forward pass counts as
the answer's.

Other models and machines: ``--model FOLDER``, or ``--shape llama-3.2-1b``; ``--help`` has the rest.
"""

from language_reference import run_bench

if __name__ == "__main__":
    run_bench("memory", takes_text=False)
