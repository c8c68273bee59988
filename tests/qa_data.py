"""Questions and passages made here, in the forms that benchmarks come in."""

from __future__ import annotations

import gzip
import json

FACTS = [
    ("Mill", "The mill at Aldbury was built in 1787 by Ruth Hale."),
    ("Ferry", "The ferry at Coldwater carries nine carts and runs twice a day."),
    ("Bell", "The bell of Saint Oda weighs four tonnes and hangs in the north tower."),
    ("Weir", "The weir below the mill was raised by two feet in 1834."),
    ("Inn", "The inn called the Green Oak burned down and stands again since 1901."),
    ("Well", "The well in the square is thirty yards deep and never ran dry."),
]
ASKED = [
    ("Who built the mill at Aldbury?", ["Ruth Hale", "Hale"], 0),
    ("How many carts does the ferry carry?", ["nine"], 1),
    ("What does the bell of Saint Oda weigh?", ["four tonnes"], 2),
    ("When was the weir raised?", ["1834"], 3),
    ("Which inn burned down?", ["the Green Oak"], 4),
]


def rows(num_passages: int = 3) -> list[dict[str, object]]:
    """Return a record for each question, its gold passage at another place each time."""
    found = []
    for number, (question, answers, gold) in enumerate(ASKED):
        others = [index for index in range(len(FACTS)) if index != gold][: num_passages - 1]
        order = [*others[: number % num_passages], gold, *others[number % num_passages :]]
        passages = [
            {"title": FACTS[index][0], "text": FACTS[index][1], "is_gold": index == gold} for index in order
        ]
        found.append({"id": f"q{number}", "question": question, "answers": answers, "passages": passages})
    return found


def write(path, records) -> str:
    """Write records as JSON lines, compressed where the name says so."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    return str(path)
