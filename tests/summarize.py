"""Mean ± spread over seeds, as Markdown: python tests/summarize.py runs/*/dual/eval/metrics.json"""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

GROUPS = ("structural", "functional")


def numbers(metrics):
    """The numbers of one evaluation that the README shows: {table: {row: {column: value}}}."""
    found = defaultdict(lambda: defaultdict(dict))
    probes = {name: run["probe"] for name, run in metrics["runs"].items()} | metrics["baselines"]
    for name, probe in probes.items():
        for phenotype, entry in probe.items():
            found["R² on test"][phenotype][name] = entry["r2"]
        found["R² on test"]["mean"][name] = statistics.mean(e["r2"] for e in probe.values())
        for group in GROUPS:
            found["R² on test"][f"mean, {group}"][name] = metrics["groups"][name][group]["r2"]
    for pair, groups in metrics["relative"].items():
        for group, entry in groups.items():
            found["mean R² of the group, relative change"][pair][group] = entry["relative"]
    for pair, targets in metrics["paired"].items():
        if "LVEF_pct" in targets:
            found["LVEF, difference of R²"][pair]["LVEF_pct"] = targets["LVEF_pct"]["delta_r2"]
    outcomes = {name: run["outcomes"] for name, run in metrics["runs"].items()}
    for name, targets in (outcomes | metrics["baseline_outcomes"]).items():
        for outcome, entry in targets.items():
            found["AUROC on test"][outcome][name] = entry["auroc"]
    for count, methods in metrics["labels"].items():
        for name, targets in methods.items():
            found["R² of LVEF by labels"][count][name] = targets["LVEF_pct"]["r2"]
    for name, run in metrics["runs"].items():
        for direction, entry in run["retrieval"].items():
            row = f"{name}, {direction}"
            for key in ("recall@1", "recall@10", "median_rank", "chance@1"):
                found["retrieval"][row][key] = entry[key]
    latents = metrics["groups"].items()
    for name, groups in ((name, groups) for name, groups in latents if "." in name):
        for group, entry in groups.items():
            found["mean R² from CMR latents"][name][group] = entry["r2"]
    return found


def main():
    seeds = [numbers(json.loads(Path(path).read_text())) for path in sys.argv[1:]]
    for table, rows in seeds[0].items():
        columns = list(
            dict.fromkeys(c for seed in seeds for row in seed[table].values() for c in row)
        )
        print(f"\n| {table} | {' | '.join(columns)} |\n{'|---' * (1 + len(columns))}|")
        for row in rows:
            cells = []
            for column in columns:
                values = [seed[table][row][column] for seed in seeds if column in seed[table][row]]
                spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "-")
            print(f"| {row} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
