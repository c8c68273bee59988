"""The table of the paper from reports of ``rag-blockcache eval``: accuracy by kind of training and attention.

    python tests/benchmarks/paper_table.py --control DIR --adapter DIR [--stock DIR] --results FILE --out FILE

What: three runs over the same questions are read: the published model, the same model fine-tuned under full
attention alone (the control, "SFT" in the paper), and block-fine-tuned on the same data for as many steps.
Each row is compared with the control under full attention, question by question: the interval is a paired
bootstrap's, of the average over the benchmarks. What was not asked at all has no row; what was asked some of
the questions only is an error.

How it can mislead: one training run of each kind; another seed would move each row by a point or so.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rag_blockcache.evaluation.bootstrap import Interval, Resamples

ROWS = (  # run, arm, what it is called
    ("stock", "full", "published model, full attention"),
    ("stock", "block", "published model, blocks"),
    ("control", "full", "fine-tuned under full attention, full attention"),
    ("control", "block", "fine-tuned under full attention, blocks"),
    ("control", "block/unmoved", "fine-tuned under full attention, blocks, keys not re-encoded"),
    ("adapter", "block", "block-fine-tuned, blocks"),
    ("adapter", "full", "block-fine-tuned, full attention"),
    ("adapter", "block/unmoved", "block-fine-tuned, blocks, keys not re-encoded"),
    ("adapter", "block/stand-ins", "block-fine-tuned behind stand-ins, such blocks"),
    ("adapter", "block/unmoved/stand-ins", "block-fine-tuned behind stand-ins, keys not re-encoded"),
)
BASELINE = ("control", "full")


def read(folders: Sequence[Path]) -> dict[str, dict[tuple[str, str], bool]]:
    """Return whether each answer is right, by arm, then by benchmark and question."""
    found: dict[str, dict[tuple[str, str], bool]] = {}
    for folder in folders:
        for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            found.setdefault(row["arm"], {})[row["dataset"], row["key"]] = row["is_correct"]
    return found


def table(runs: dict[str, dict[str, dict[tuple[str, str], bool]]]) -> tuple[list[dict], list[str]]:
    """Return the rows, and the benchmarks; an arm must have answered every question, or none."""
    questions = sorted(runs[BASELINE[0]][BASELINE[1]])
    datasets = sorted({dataset for dataset, _ in questions})
    resamples = {name: Resamples([key for dataset, key in questions if dataset == name]) for name in datasets}

    def draws(run: str, arm: str) -> dict[str, np.ndarray]:
        right = runs[run][arm]
        if missing := [question for question in questions if question not in right]:
            raise SystemExit(
                f"{run}, {arm}: {len(missing)} questions have no answer, e.g. {missing[0]}; run it on"
            )
        return {
            name: resamples[name].ratio([right[each] for each in questions if each[0] == name])
            for name in datasets
        }

    baseline = np.mean(list(draws(*BASELINE).values()), axis=0)
    rows = []
    for run, arm, label in ROWS:
        if arm not in runs.get(run, {}):
            continue
        drawn = draws(run, arm)
        average = np.mean(list(drawn.values()), axis=0)
        gain = Interval.of(100 * (average - baseline))
        rows.append(
            {"row": label}
            | {name: f"{100 * values[0]:.1f}" for name, values in drawn.items()}
            | {
                "average": f"{100 * average[0]:.1f}",
                "gain": "" if (run, arm) == BASELINE else f"{gain.value:+.1f}",
            }
            | {"gain_interval": "" if (run, arm) == BASELINE else f"{gain.low:+.1f} to {gain.high:+.1f}"}
        )
    return rows, datasets


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the paper's table of three evaluations.")
    for run in ("stock", "control", "adapter"):
        parser.add_argument(
            f"--{run}",
            type=Path,
            required=run != "stock",
            help="folder of its report, or several of them",
            nargs="+",
        )
    parser.add_argument(
        "--results", type=Path, required=True, help="result file of the control: hardware, versions"
    )
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    given = {run: getattr(options, run) for run in ("stock", "control", "adapter")}
    rows, datasets = table({run: read(folders) for run, folders in given.items() if folders})
    measured = json.loads(options.results.read_text(encoding="utf-8"))
    columns = {"row": "model and attention"} | {name: name for name in datasets}
    columns |= {"average": "average", "gain": "less the control", "gain_interval": "95 %"}
    result = {
        "command": "python tests/benchmarks/paper_table.py",
        "hardware": measured["hardware"],
        "versions": measured["versions"],
        "model": "SmolLM2-135M-Instruct",
        "dtype": measured["dtype"],
        "columns": columns,
        "rows": rows,
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
