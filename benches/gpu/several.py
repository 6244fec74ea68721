"""Measures `hone run` on 1, 2, ... GPUs of this machine: tokens/s with the same work for each, and the share of the ideal speed.

    several.py --hone BIN --folder MODEL --out JSON [--gpus N] [--shape phi3-mini|small] [--cpu]

MODEL has the weights that `prepare` wrote. A step has 11 examples and 4,096 tokens for each GPU (LENGTHS of work.py), so a step of N
GPUs has N times the tokens of one. With fewer than two GPUs the result says so, and nothing is run. A rehearsal names the fake driver's
GPUs (`--gpus 2`), or takes processes that compute on the CPU (`--cpu`).
"""
import argparse
import datetime
import json
import os
import random
import shutil
import subprocess
import sys

import work

STEPS, WARM = 14, 4
SECONDS = 150  # of one run; loading the weights takes most of it


def gpus():
    """How many GPUs the driver shows."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def tokenizer(vocabulary):
    """A tokenizer whose words are t0, t1, ...: a text of N words has N tokens."""
    words = {f"t{number}": number for number in range(vocabulary)}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
            "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
            "model": {"type": "WordLevel", "vocab": words, "unk_token": "t0"}}


def base(folder, scratch):
    """The model with a tokenizer beside it."""
    made = os.path.join(scratch, "model")
    os.makedirs(made)
    for name in os.listdir(folder):
        if name == "config.json" or name.endswith(".safetensors") or name.endswith(".index.json"):
            os.symlink(os.path.join(os.path.abspath(folder), name), os.path.join(made, name))
    with open(os.path.join(folder, "config.json")) as file:
        vocabulary = json.load(file)["vocab_size"]
    for name, content in {"tokenizer.json": tokenizer(vocabulary), "tokenizer_config.json": {"eos_token": "t2"}}.items():
        with open(os.path.join(made, name), "w") as file:
            json.dump(content, file)
    return made, vocabulary


def rows(file, lengths, count, vocabulary, seed=1):
    """Texts of these lengths over and over, each step's in an order of its own. A text's end is a token more."""
    draw = random.Random(seed)
    with open(file, "w") as out:
        for _ in range(count // len(lengths)):
            for length in draw.sample(lengths, len(lengths)):
                text = " ".join(f"t{draw.randrange(3, vocabulary)}" for _ in range(max(1, length - 1)))
                out.write(json.dumps({"text": text}) + "\n")


def run(options, scratch, model, vocabulary, ranks):
    """One run; its steps as (seconds since the first line, step, tokens so far)."""
    lengths = work.lengths(work.SHAPES[options.shape]["tokens"])
    data, out = (os.path.join(scratch, f"{ranks}-{name}") for name in ("rows.jsonl", "results"))
    rows(data, lengths, STEPS * ranks * len(lengths), vocabulary)
    settings = {"TrainingArguments.per_device_train_batch_size": ranks * len(lengths), "TrainingArguments.max_steps": STEPS,
                "TrainingArguments.gradient_accumulation_steps": 1, "TrainingArguments.logging_steps": 1,
                "TrainingArguments.save_strategy": "no", "DatasetConfig.train_test_split": 1,
                "DatasetConfig.shuffle_dataset": "false", "LoraConfig.r": work.RANK, "LoraConfig.target_modules": "all-linear",
                "QuantizationConfig.load_in_4bit": "true", "ModelConfig.torch_dtype": "float32" if options.cpu else "bfloat16"}
    place = ["--device", "cpu", "--ranks", str(ranks)] if options.cpu else ["--gpus", str(ranks)]
    command = [options.hone, "run", "--model", model, "--data", data, "--output", out, *place]
    command += [f"--set={key}={value}" for key, value in settings.items()]
    done = subprocess.run(command, env=dict(os.environ, HONE_LOG="json"), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True, timeout=SECONDS)
    shutil.rmtree(out, ignore_errors=True)
    sys.stderr.write(done.stderr[-3000:])
    if done.returncode != 0:
        raise RuntimeError(f"hone run with {ranks} ranks ended with code {done.returncode}")
    steps = []
    for line in done.stderr.splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if "grad_norm" in found and "num_tokens" in found:
            at = datetime.datetime.fromisoformat(found["timestamp"].replace("Z", "+00:00")).timestamp()
            steps.append((at, found["step"], found["num_tokens"], found["loss"]))
    return steps


def measure(steps, ranks):
    """Tokens/s after the first steps, which also warm up, and the seconds of each step."""
    # A step's line comes while the next step runs, and the last one's follows at once.
    timed = steps[WARM:-1]
    seconds = [late[0] - early[0] for early, late in zip(timed, timed[1:])]
    tokens = timed[-1][2] - timed[0][2]
    return {"ranks": ranks, "tokens_per_second": tokens / sum(seconds), "tokens_a_step": tokens / len(seconds),
            "step_seconds": seconds, "step_seconds_median": sorted(seconds)[len(seconds) // 2], "loss": steps[-1][3]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--hone", "--folder", "--out"):
        parser.add_argument(flag, required=True)
    parser.add_argument("--shape", choices=sorted(work.SHAPES), default="phi3-mini")
    parser.add_argument("--gpus", type=int, help="in place of those that nvidia-smi lists")
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()
    there = gpus() if options.gpus is None else options.gpus
    result = {"gpus": there, "several": []}
    if there < 2:
        result["skipped"] = f"{there} GPU: efficiency needs two or more"
    else:
        scratch = os.path.join(os.path.dirname(os.path.abspath(options.out)), "several")
        shutil.rmtree(scratch, ignore_errors=True)
        model, vocabulary = base(options.folder, scratch)
        for ranks in sorted({1, 2, 4, there} & set(range(there + 1))):
            try:
                found = measure(run(options, scratch, model, vocabulary, ranks), ranks)
            except (RuntimeError, IndexError, subprocess.TimeoutExpired) as error:
                result["error"] = str(error)
                break
            single = result["several"][0]["tokens_per_second"] if result["several"] else found["tokens_per_second"]
            result["several"].append(found | {"efficiency": found["tokens_per_second"] / ranks / single})
        shutil.rmtree(scratch, ignore_errors=True)
    with open(options.out, "w") as file:
        json.dump(result, file, indent=1)
    print(json.dumps(result))
    return int("error" in result)


if __name__ == "__main__":
    sys.exit(main())
