"""Time and error of `fit_gate`: one row a fit, the median of several runs.

    OMP_NUM_THREADS=1 python -m benchmarks.fit [--json]

`level` is the error of the optimum; `proof` says that as many extrema alternate at it as optimality needs.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from typing import Any

from rsae.artefacts import provenance
from rsae.minimax import NumericalWarning, fit_gate

CASES: list[tuple[str, tuple[int, int], dict[str, Any]]] = [
    ("relu", (3, 2), {}),
    ("relu", (9, 8), {}),
    ("relu", (8, 8), {}),
    ("relu", (12, 12), {}),
    ("relu", (25, 24), {}),
    ("abs", (30, 30), {}),
    ("jumprelu", (5, 4), {"theta": 0.1, "delta": 0.005}),
    ("jumprelu", (9, 8), {"theta": 0.1, "delta": 0.005}),
    ("jumprelu", (9, 8), {"theta": -0.7, "delta": 1e-4}),
    ("jumprelu", (12, 12), {"theta": 0.4, "delta": 0.01}),
    ("jumprelu", (5, 9), {"theta": 0.4, "delta": 0.01}),
    ("jumprelu", (19, 18), {"theta": 0.4, "delta": 0.001}),
    ("heaviside", (8, 8), {"theta": 0.1, "delta": 0.005}),
    ("sign", (10, 10), {"delta": 0.001}),
    ("relu", (3, 2), {"method": "relaxed-remez"}),
    ("jumprelu", (9, 8), {"theta": 0.1, "delta": 0.005, "method": "relaxed-remez"}),
]


def row(gate: str, degree: tuple[int, int], options: dict[str, Any], runs: int) -> dict[str, Any]:
    """One case: its fit, and the median time in milliseconds."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NumericalWarning)
            fit = fit_gate(gate, degree, **options)
        times.append(1e3 * (time.perf_counter() - start))
    return {
        "gate": gate,
        "degree": degree,
        **options,
        "level": fit.max_error,
        "alternation": fit.alternation,
        "proof": fit.converged and fit.method == "minimax",
        "iterations": fit.iterations,
        "ms": statistics.median(times),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--runs", type=int, default=7, help="runs of each case (default 7)")
    arguments = parser.parse_args()
    rows = [row(*case, arguments.runs) for case in CASES]
    where = provenance()
    if arguments.json:
        print(json.dumps({"rows": rows, "provenance": where}))
        return
    print(
        f"{platform.processor() or platform.machine()}, {where['machine']['cores']} cores, commit {where['commit']}\n"
    )
    print("| gate | degree | theta | delta | method | level | alternation | proof | iterations | ms |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for r in rows:
        theta, delta = r.get("theta", ""), r.get("delta", "")
        print(
            f"| {r['gate']} | {r['degree']} | {theta} | {delta} | {r.get('method', 'minimax')} | {r['level']:.5e} "
            f"| {r['alternation']} | {'yes' if r['proof'] else 'no'} | {r['iterations']} | {r['ms']:.1f} |"
        )


if __name__ == "__main__":
    main()
