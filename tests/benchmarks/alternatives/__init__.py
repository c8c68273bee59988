"""What one would use instead of this library, each a short implementation of what it publishes.

Reading order: ``prompts`` (what all of them are asked), ``way`` (what each of them is), ``references`` (the
logits that they should give); then ``stock`` (transformers, with and without its prefix cache),
``block_attention``, ``turborag``, ``llama_cpp`` and its ``llama_cpp_worker``; ``this_library``.
"""
