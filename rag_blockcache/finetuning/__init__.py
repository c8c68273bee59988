"""Block fine-tuning: a model learns to answer over passages that do not see one another.

Reading order: ``recipe`` (all options), ``examples`` (files to questions, passages and answers), ``order``
(which example comes next), ``samples`` (one example to tokens, by the same code that serves), ``packing``
(samples to rows of equal length), ``rows`` (all of this together, in parallel), ``mask`` (what a token sees),
``network`` (the model, its adapter, saving and merging), ``trainer`` (the loss, on top of transformers'
Trainer), ``held_out`` and ``progress`` (what is measured meanwhile), ``curves`` and ``card`` (what is written
in the end), and ``finetune``, which wires them.

``python -m rag_blockcache.finetuning --help`` lists the options, and ``rag-blockcache finetune`` takes the
same ones.
"""
