"""``python -m rag_blockcache.cli`` is ``rag-blockcache``."""

from rag_blockcache.cli.app import main

main()
