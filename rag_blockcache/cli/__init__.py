"""The command line, ``rag-blockcache``: the only part of the library that prints.

One file per group of commands, ``app`` puts them together. Torch and transformers are imported inside
the commands that need them, so that ``--help`` answers at once.
"""

from rag_blockcache.cli.app import app, main

__all__ = ["app", "main"]
