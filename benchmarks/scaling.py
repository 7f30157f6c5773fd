"""How the time of a fine-tuning step grows with the latents, with L0 and with the batch, beside the floor of the same sizes.

    python -m benchmarks.scaling [--json] [--quick]

One size varies at a time about d_in 640, d_sae 5,120, L0 32, batches of 2,048. The floor is that of `benchmarks.step`: the
encoder's product, Adam over both matrices, a pass over the pre-activations. Cost grows as the work if the last column stays level.
"""

from __future__ import annotations

import argparse
import json

from benchmarks.step import BATCH, D_IN, D_SAE, L0, Activations, floor, ours
from benchmarks.timing import machine, median_ms

from rsae.cpu import keep_pages
from rsae.sparse import pre_activations

SWEEPS = {
    "d_sae": [4096, 8192, 16_384, 32_768, 65_536, 131_072],
    "l0": [16, 32, 64, 128, 256],
    "batch": [512, 1024, 2048, 4096, 8192, 16_384],
}
QUICK = {"d_sae": [4096, 8192], "l0": [16, 64], "batch": [512, 2048]}


def measure(d_sae: int = D_SAE, l0: int = L0, batch: int = BATCH) -> dict[str, float]:
    """Milliseconds of a step and of its floor, and the entries that a token has near its edges."""
    data = Activations(D_IN, d_sae, l0)
    x = next(data.batches(batch, seed=0))
    trainee, step = ours(data, x)
    ms = median_ms(step, runs=5, warmup=2)
    entries = len(trainee.choose(pre_activations(x - trainee.centre, trainee.W_enc, trainee.b_enc)).rows) / batch
    del trainee, step
    least = median_ms(floor(x, d_sae), runs=5, warmup=2)
    return {
        "ms": round(ms, 1),
        "floor_ms": round(least, 1),
        "vs_floor": round(ms / least, 2),
        "entries": round(entries, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="two sizes of each")
    arguments = parser.parse_args()
    keep_pages()
    where = machine()
    if not arguments.json:
        print(f"a step of {BATCH} x {D_IN} -> {D_SAE}, L0 {L0}, but for what varies; {where}")
    found: dict[str, dict[int, dict[str, float]]] = {}
    for name, sizes in (QUICK if arguments.quick else SWEEPS).items():
        found[name] = {}
        for size in sizes:
            row = found[name][size] = measure(**{name: size})
            if not arguments.json:
                print(
                    f"  {name:<6}{size:>8,}{row['ms']:>10,.1f} ms{row['entries']:>8.0f} entries a token"
                    f"{row['vs_floor']:>8.2f} floors"
                )
    if arguments.json:
        print(json.dumps({"sweeps": found, "machine": where}))


if __name__ == "__main__":
    main()
