"""Runs llama.cpp in a process and an environment of its own; see ``llama_cpp``. Knows nothing of the project.

    python llama_cpp_worker.py MODEL.gguf COPY.gguf CONTEXT_LENGTH THREADS

Unpacks the model into COPY, in bfloat16. Reads a JSON object a line, ``{"token_ids": [...], "keeps_prefix":
true, "wants_logits": false}``, and answers each with one: the most likely next token, how many tokens were
computed for it, and on demand all logits.
"""

import ctypes
import json
import sys

import llama_cpp

ERROR = 4  # of ggml's levels


@llama_cpp.llama_log_callback
def log(level, text, _):
    """Pass on errors alone; unpacking says a line a tensor."""
    if level == ERROR:
        print(text.decode(errors="replace"), end="", file=sys.stderr)


class Counting(llama_cpp.Llama):
    """Counts the tokens that it computes."""

    num_computed = 0

    def eval(self, tokens):
        self.num_computed += len(tokens)
        super().eval(tokens)


def unpack(source: str, target: str) -> None:
    """Write the model again with the weights that transformers computes with."""
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_BF16, True
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(options)):
        sys.exit(f"llama.cpp cannot unpack {source} to bfloat16")


def answer(model: Counting, asked: dict) -> dict:
    """Take one prompt to its first token, from the longest prefix that it shares with the one before."""
    if not asked["keeps_prefix"]:
        model.reset()
    model.num_computed = 0
    token = next(model.generate(asked["token_ids"], temp=0.0))
    found = {"token": int(token), "num_computed": model.num_computed}
    if asked["wants_logits"]:
        logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
        found["logits"] = [logits[index] for index in range(model.n_vocab())]
    return found


def main(source: str, copy: str, context_length: str, threads: str) -> None:
    llama_cpp.llama_log_set(log, None)
    unpack(source, copy)
    model = Counting(
        copy,
        n_ctx=int(context_length),
        n_threads=int(threads),
        n_threads_batch=int(threads),
        flash_attn=True,  # sooner on a CPU too
        verbose=False,
    )
    print(json.dumps({"version": llama_cpp.__version__}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(model, json.loads(line))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
