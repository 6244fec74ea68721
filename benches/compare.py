"""Runs commands in turn (A B, B A, ...) and prints each one's figures as minimum, median, maximum.

    python benches/compare.py --rounds 5 --key tokens_per_s 'hone=target/release/deps/step-... --precision bf16' \
        'reference=python benches/reference.py MODEL --dtype bfloat16'

A command's last output line may be JSON; `--key` names the figure in it. Without `--key` the wall time is taken.
"""
import argparse
import json
import os
import statistics
import subprocess
import time

parser = argparse.ArgumentParser()
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--key")
parser.add_argument("commands", nargs="+", help="NAME=COMMAND")
options = parser.parse_args()
commands = dict(text.split("=", 1) for text in options.commands)
figures = {name: [] for name in commands}
peaks = {name: [] for name in commands}
for turn in range(options.rounds):
    for name in list(commands)[:: 1 if turn % 2 == 0 else -1]:
        began = time.monotonic()
        process = subprocess.Popen(commands[name], shell=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0, f"{name} failed"
        seconds = time.monotonic() - began
        figures[name].append(json.loads(output.strip().splitlines()[-1])[options.key] if options.key else seconds)
        peaks[name].append(usage.ru_maxrss / 1024)
for name, values in figures.items():
    print(f"{name:12} {options.key or 'seconds'}: min {min(values):.4g}  median {statistics.median(values):.4g}  "
          f"max {max(values):.4g}   peak {statistics.median(peaks[name]):.0f} MB   load {os.getloadavg()[0]:.1f}")
