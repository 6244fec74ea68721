"""hone and the reference stack from the same bytes: losses of five steps, and the first step's LoRA gradients.

    parity.py --ours BINARY --folder F --out JSON     after `reference.py prepare --folder F`

f32 differs by the order of sums alone. In bf16 both sides round at different places: each is compared with the reference's f32
gradients. The sum of hone's distances over all sites may be no larger than that of the reference's own bf16, and no site may be
much farther. The reference has no products in 8 bits: hone's are compared with f32.
"""
import argparse
import json
import os
import subprocess

import numpy
from safetensors.numpy import load_file

# Largest relative difference of a step's loss, smallest cosine of a site's gradient in f32.
BOUNDS = {"f32": ("float32", 1e-4), "bf16": ("bfloat16", 5e-3), "fp8": ("float32", 2e-2)}
COSINE_MIN = 0.99999
# Largest ratio of hone's distance (1 - cosine) from f32 to the reference's, in bf16: of all sites' sums, and of one
# site. On an H100 the worst site had 0.94. The distance of a small matrix scatters by chance: over six seeds of the
# shape `small` the sums had 0.80 to 0.92, and the worst of 16 sites, another one for each seed, had 1.04 to 1.39.
SUM_MAX = 1.0
DISTANCE_MAX, DISTANCE_MAX_SMALL, VALUES_SMALL = 1.1, 1.6, 10_000
# Smallest cosine in 8 bits: of the site in the middle, and of any.
COSINE_MIDDLE_8_BITS, COSINE_MIN_8_BITS = 0.98, 0.9


def cosine(a, b):
    a, b = a.astype(numpy.float64).ravel(), b.astype(numpy.float64).ravel()
    return float(a @ b / max(numpy.linalg.norm(a) * numpy.linalg.norm(b), 1e-300))


def compare(folder, precision, ours, reference):
    name, loss_bound = BOUNDS[precision]
    differences = [abs(a - b) / abs(b) for a, b in zip(ours["losses"], reference[name]["losses"], strict=True)]
    found = load_file(os.path.join(folder, f"ours-{precision}.safetensors"))
    expected = load_file(os.path.join(folder, "gradients-float32.safetensors"))
    assert found.keys() == expected.keys(), f"names differ: {sorted(found.keys() ^ expected.keys())[:4]}"
    cosines = {key: cosine(found[key], expected[key]) for key in sorted(found)}
    norms = {key: float(numpy.linalg.norm(found[key]) / max(numpy.linalg.norm(expected[key]), 1e-300)) for key in cosines}
    # The lowest cosine that each site may have, and the ratio of the distances' sums.
    bounds, sums = dict.fromkeys(cosines, COSINE_MIN), 0.0
    if precision == "bf16":
        own = load_file(os.path.join(folder, f"gradients-{name}.safetensors"))
        distances = {key: 1 - cosine(own[key], expected[key]) for key in cosines}
        most = {key: DISTANCE_MAX_SMALL if expected[key].size < VALUES_SMALL else DISTANCE_MAX for key in cosines}
        bounds = {key: 1 - most[key] * distances[key] for key in cosines}
        sums = sum(1 - found for found in cosines.values()) / max(sum(distances.values()), 1e-300)
    if precision == "fp8":
        bounds = dict.fromkeys(cosines, COSINE_MIN_8_BITS)
    middle = sorted(cosines.values())[len(cosines) // 2]
    worst = min(cosines, key=lambda key: cosines[key] - bounds[key])
    return {"losses": ours["losses"], "reference_losses": reference[name]["losses"], "loss_differences": differences,
            "loss_difference_max": max(differences), "loss_bound": loss_bound, "cosine_min": cosines[worst], "cosine_of": worst, "cosine_median": middle,
            "cosine_bound": bounds[worst], "distance_ratio": sums, "norm_ratio_min": min(norms.values()), "norm_ratio_max": max(norms.values()),
            "good": max(differences) <= loss_bound and cosines[worst] >= bounds[worst] and sums <= SUM_MAX
                    and (precision != "fp8" or middle >= COSINE_MIDDLE_8_BITS)}


parser = argparse.ArgumentParser()
parser.add_argument("--ours", required=True)
parser.add_argument("--folder", required=True)
parser.add_argument("--device", default="cuda:0")
parser.add_argument("--out", required=True)
options = parser.parse_args()
with open(os.path.join(os.path.dirname(options.out), "prepare.json")) as file:
    reference = json.load(file)
results = {}
for precision in BOUNDS:
    out = f"{options.out}.{precision}"
    subprocess.run([options.ours, "parity", "--folder", options.folder, "--precision", precision, "--device", options.device, "--out", out],
                   check=True)
    with open(out) as file:
        results[precision] = compare(options.folder, precision, json.load(file), reference)
    with open(options.out, "w") as file:
        json.dump(results, file, indent=1)
bad = [precision for precision, result in results.items() if not result["good"]]
raise SystemExit(f"beyond its bounds: {', '.join(bad)}" if bad else 0)
