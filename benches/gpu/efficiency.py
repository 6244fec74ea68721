#!/usr/bin/env python3
"""Predicts how much of N GPUs' speed a run gets, from measured steps of one GPU and from rates of links. No GPU is asked.

    benches/gpu/efficiency.py [FILE...] [--tokens 4096]    FILE: report.json of benches/gpu/session, or a part of it

A step of N ranks takes as long as the slowest rank, plus what the sum of the gradients adds. The terms:
  work      a rank's share of the tokens. Examples are dealt to the ranks by their tokens, the longest first; the slowest rank has the
            largest share, which `imbalance` finds for the lengths of work.py. The time goes with the tokens.
  jitter    ranks do not repeat a step to the microsecond: the expected largest of N draws from the measured steps, over their mean.
  sum       2 (N - 1) / N x bytes / rate + 2 (N - 1) x latency: a ring, as NCCL computes it. The bytes are 4 for each trained value.
            Overlapped with the backward pass, its first parts are hidden; the last bucket is not.
  exchange  one message of each rank to rank 0 and back, on the host, while the GPU works. It counts in full all the same.
"""
import argparse
import glob
import json
import os
import random

import work

HERE = os.path.dirname(os.path.abspath(__file__))
# name: bytes/s of a ring's link in one direction in practice, seconds of a hop, seconds of a message between hosts and
# back.
LINKS = {
    "NVLink 4 (H100 SXM)": (300e9, 3e-6, 50e-6),
    "PCIe 5 x16": (40e9, 5e-6, 50e-6),
    "PCIe 4 x16": (20e9, 5e-6, 50e-6),
    "400 Gb/s RDMA": (45e9, 8e-6, 50e-6),
    "100 Gb/s Ethernet": (11e9, 30e-6, 200e-6),
    "25 Gb/s Ethernet": (2.8e9, 30e-6, 200e-6),
}
RANKS = {"NVLink 4 (H100 SXM)": (2, 4, 8), "PCIe 5 x16": (2, 4, 8), "PCIe 4 x16": (2, 4, 8), "400 Gb/s RDMA": (16, 64),
         "100 Gb/s Ethernet": (2, 8), "25 Gb/s Ethernet": (2, 8)}
BACKWARD = 0.6  # of a step; the rest is the forward pass and the update
BUCKETS = 8
DRAWS = 400


def measured(files):
    """(what was trained, seconds of each step, trained values) of each stage that trained `tokens` a step."""
    for file in files:
        with open(file) as text:
            stages = json.load(text)["stages"]
        for stage in stages:
            result = stage.get("result") or {}
            if stage["stage"].startswith("bench-") and "step_seconds" in result:
                yield result["base"], result["tokens"], result["step_seconds"], result["trainable_parameters"]


def imbalance(ranks, tokens, seed=1):
    """Tokens of the slowest rank over the mean of all, on average over many steps with about `tokens` a rank."""
    draw = random.Random(seed)
    found = []
    for _ in range(DRAWS):
        # An optimizer step has a fixed number of examples, not of tokens.
        count = round(ranks * tokens / (sum(work.LENGTHS) / len(work.LENGTHS)))
        shares = [0] * ranks
        for length in sorted(draw.choices(work.LENGTHS, k=count), reverse=True):
            shares[shares.index(min(shares))] += length
        found.append(max(shares) * ranks / sum(shares))
    return sum(found) / len(found)


def jitter(ranks, seconds):
    """The expected largest of `ranks` draws from the measured steps, over their mean."""
    ordered, n = sorted(seconds), len(seconds)
    largest = sum(value * (((at + 1) / n) ** ranks - (at / n) ** ranks) for at, value in enumerate(ordered))
    return largest / (sum(seconds) / n)


def ring(ranks, count, rate, hop):
    return 2 * (ranks - 1) / ranks * 4 * count / rate + 2 * (ranks - 1) * hop


def predict(seconds, count, ranks, link, tokens):
    """Shares of the ideal speed: (with the sum behind the backward pass, overlapped with it), and the parts of the time."""
    rate, hop, message = LINKS[link]
    step = sum(seconds) / len(seconds)
    slowest = step * imbalance(ranks, tokens) * jitter(ranks, seconds)
    whole = ring(ranks, count, rate, hop)
    bucket = ring(ranks, count / BUCKETS, rate, hop)
    # The buckets before the last are hidden as far as the backward pass that is left lasts.
    hidden = min((BUCKETS - 1) * bucket, BACKWARD * step * (BUCKETS - 1) / BUCKETS)
    overlapped = BUCKETS * bucket - hidden
    return step / (slowest + whole + message), step / (slowest + overlapped + message), whole, slowest / step - 1


def table(rows):
    lines = ["| model, rank 8 | step of one GPU | link | ranks | slowest rank | sum | at the end | overlapped |", "|---|---|---|---|---|---|---|---|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=sorted(glob.glob(os.path.join(HERE, "measured/h100-*/*-part.json"))))
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a rank and step")
    options = parser.parse_args()
    rows = []
    for name, tokens, seconds, count in measured(options.files):
        # Steps of other lengths were not measured: the time goes with the tokens.
        seconds = [second * options.tokens / tokens for second in seconds]
        for link, sizes in RANKS.items():
            for ranks in sizes:
                end, overlapped, whole, slower = predict(seconds, count, ranks, link, options.tokens)
                rows.append([name, f"{1e3 * sum(seconds) / len(seconds):.0f} ms", link, str(ranks), f"+{100 * slower:.1f} %",
                             f"{1e3 * whole:.2f} ms", f"{100 * end:.1f} %", f"{100 * overlapped:.1f} %"])
    print(table(rows))


if __name__ == "__main__":
    main()
