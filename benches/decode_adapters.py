"""What adapters cost while decoding on this machine's CPU: `hone serve` with and without them, turn by turn in one run, on a random model.

Usage: python benches/decode_adapters.py HONE [SHAPE [ROUNDS]]      SHAPE: 135m or 1b

One server has the base and four random adapters of rank 16 on all linear layers. A round asks for a short and a long greedy answer from
each side in turn: one request of the base and one of an adapter, then 32 requests of the base at once and 32 that are dealt to the four
adapters. tokens/s are those of the difference, so that neither the prompt nor the request counts.
"""
import json
import os
import statistics
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file

from decode import PROMPT, SHAPES, TOKENS, Hone, random_model

RANK, ADAPTERS, REQUESTS = 16, 4, 32
MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def random_adapter(shape, number, folder):
    """A PEFT folder with both matrices of every pair drawn."""
    config = SHAPES[shape]
    width, middle, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head = config.get("head_dim", width // heads)
    queries, keys = head * heads, head * config["num_key_value_heads"]
    sizes = dict(zip(MODULES, ((queries, width), (keys, width), (keys, width), (width, queries), (middle, width), (middle, width), (width, middle))))
    torch.manual_seed(number)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for module, (rows, columns) in sizes.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, columns) / columns**0.5
            tensors[f"{name}.lora_B.weight"] = 0.01 * torch.randn(rows, RANK)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "lora_dropout": 0.0, "bias": "none",
        "target_modules": [module.split(".")[1] for module in MODULES], "base_model_name_or_path": "m"}))


def answer(address, model, tokens):
    body = {"model": model, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(f"{address}/v1/completions", json.dumps(body).encode())
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=600) as found:
        assert json.load(found)["usage"]["completion_tokens"] == tokens


def speed(address, models, few, many):
    """Tokens/s of all these requests together."""
    times = []
    with ThreadPoolExecutor(len(models)) as pool:
        for tokens in (few, many):
            begun = time.perf_counter()
            list(pool.map(lambda model: answer(address, model, tokens), models))
            times.append(time.perf_counter() - begun)
    return len(models) * (many - few) / (times[1] - times[0])


def main():
    program, shape = Path(sys.argv[1]).resolve(), sys.argv[2] if len(sys.argv) > 2 else "135m"
    rounds = int(sys.argv[3]) if len(sys.argv) > 3 else 5
    few, many = TOKENS[shape]
    names = [f"a{number}" for number in range(ADAPTERS)]
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "model"
        random_model(shape, folder)
        for number, name in enumerate(names):
            random_adapter(shape, number, Path(work) / name)
        adapters = [word for name in names for word in ("--adapter", f"{name}={Path(work) / name}")]
        hone = Hone(program, folder, "--sequences", str(REQUESTS), *adapters)
        dealt = [names[number % ADAPTERS] for number in range(REQUESTS)]
        sides = {"1 request, base": ["m"], "1 request, 1 adapter": names[:1],
                 f"{REQUESTS} requests, base": ["m"] * REQUESTS, f"{REQUESTS} requests, {ADAPTERS} adapters": dealt}
        found = {name: [] for name in sides}
        for _ in range(rounds):
            for name, models in sides.items():
                found[name].append(speed(hone.address, models, few, many))
        hone.process.terminate()
        hone.process.wait()
        load = ", ".join(f"{number:.1f}" for number in os.getloadavg())
        print(f"{shape}, {len(os.sched_getaffinity(0))} cores, {rounds} rounds, load {load}")
        for name, speeds in found.items():
            print(f"{name:28} {statistics.median(speeds):7.1f} tokens/s ({min(speeds):.1f} to {max(speeds):.1f})")
        kinds = list(found.values())
        for bare, tuned, what in ((kinds[0], kinds[1], "one adapter"), (kinds[2], kinds[3], "four adapters")):
            slower = [100 * (base / other - 1) for base, other in zip(bare, tuned)]
            print(f"{what}: {statistics.median(slower):.1f} % slower, of the rounds {min(slower):.1f} to {max(slower):.1f}")


if __name__ == "__main__":
    main()
