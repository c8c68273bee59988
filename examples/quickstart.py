"""The same passages, asked about three times: encoded for the first question, reused for the others.

Run it with ``python examples/quickstart.py``. It needs no network; see ``small_models``.
"""

import tempfile

from small_models import smollm2_path

from rag_blockcache import BlockCache, Passage

PASSAGES = [
    Passage(
        "The lighthouse on the north rock was built in 1854, after three ships were lost there in one "
        "winter. Its lamp burned whale oil until 1891, when a gas line was laid under the harbour. Two "
        "keepers lived in the tower and took turns of twelve hours, because the clockwork that turned "
        "the lens had to be wound every four hours by hand.",
        title="Lighthouse",
    ),
    Passage(
        "The harbour freezes in most winters, so the ferry to the island rests from December to March. "
        "While it rests, mail and medicine are carried across the ice by sled. The ice is measured every "
        "morning, and the crossing is closed when it is thinner than a hand is wide.",
        title="Ferry",
    ),
    Passage(
        "The island has one school with two rooms. Children walk there along the old railway, which "
        "carried granite to the harbour until the quarry closed. The last locomotive stands in the school "
        "yard, painted green, and the older pupils oil its wheels in spring.",
        title="School",
    ),
]

with tempfile.TemporaryDirectory() as directory, BlockCache(smollm2_path(), directory) as cache:
    for question, passages in [
        ("Where does the last locomotive stand?", PASSAGES),
        ("What did the old railway carry?", PASSAGES),
        ("When was the lighthouse built?", PASSAGES[::-1]),  # in another order, too
    ]:
        answer = cache.generate(question, passages, max_new_tokens=40)
        print(f"{question}\n  {answer.text.strip()}")
        print(
            f"  first token after {answer.ttft_seconds:.3f} s: {answer.num_hits} passages reused, "
            f"{answer.num_misses} encoded, {answer.num_reused_tokens} of "
            f"{answer.num_reused_tokens + answer.num_computed_tokens} tokens not computed ({answer.policy})"
        )
