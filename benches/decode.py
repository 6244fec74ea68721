"""Decoding on this machine's CPU: `hone serve` against transformers in bf16, turn by turn in one run, on a random model.

Usage: python benches/decode.py HONE [SHAPE [ROUNDS]]      SHAPE: 135m or 1b

A round asks each side for a short and a long greedy answer to the same prompt; tokens/s are those of the difference, so that
neither the prompt nor the request counts. With LLAMA_CPP_PYTHON, a Python that has xllamacpp and gguf, llama.cpp takes part with the
same weights in q4_0 (decode_llama_cpp.py). HONE_ONLY=1 leaves the others out. hone runs with its default base (NF4, scales quantised too) and with bf16. The start is
measured from the program's first instruction to the end of a first answer of one token, with the files in the page cache.
"""
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy
import torch
import transformers
from safetensors.torch import load_file

SHAPES = {
    "135m": dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                 num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True),
    "1b": dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
               num_key_value_heads=8, head_dim=64, max_position_embeddings=2048, tie_word_embeddings=True),
}
TOKENS = {"135m": (16, 144), "1b": (4, 36)}
if few := os.environ.get("HONE_TOKENS"):  # A busy machine: short answers, more rounds.
    TOKENS = dict.fromkeys(TOKENS, tuple(int(part) for part in few.split(",")))
PROMPT = [(7 * at) % 400 + 3 for at in range(64)]
GOLDEN = Path(__file__).resolve().parent.parent / "tests/golden/llama3/model"


def random_model(shape, folder):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPES[shape], torch_dtype="bfloat16")
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (GOLDEN / name).exists():
            shutil.copy(GOLDEN / name, folder / name)


class Hone:
    def __init__(self, program, folder, *more):
        self.log = tempfile.NamedTemporaryFile("w+")
        begun = time.time()
        self.process = subprocess.Popen([program, "--log", "json", "serve", folder, "--name", "m", "--listen", "127.0.0.1:0", "--device",
                                         "cpu", "--context", "512", "--cache", folder / "cache", *more], stderr=self.log)
        while True:
            line = next((line for line in open(self.log.name) if "ready: " in line), None)
            if line:
                break
            if self.process.poll() is not None:
                raise SystemExit(open(self.log.name).read())
            time.sleep(0.005)
        self.address = line.split(" at ")[1].split('"')[0]
        self.answer(1)
        self.start = time.time() - begun

    def answer(self, tokens):
        body = {"prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(f"{self.address}/v1/completions", json.dumps(body).encode())
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=600) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == tokens


class Transformers:
    def __init__(self, folder):
        begun = time.time()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self.config = transformers.GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=None)
        self.model.generation_config = self.config
        self.answer(1)
        self.start = time.time() - begun

    def answer(self, tokens):
        ids = torch.tensor([PROMPT])
        with torch.no_grad():
            out = self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=self.config,
                                      max_new_tokens=tokens)
        assert out.shape[1] == len(PROMPT) + tokens


class LlamaCpp:
    def __init__(self, python, shape, folder, threads):
        weights = {}
        for name, tensor in load_file(folder / "model.safetensors").items():
            weights[name] = tensor.to(torch.float32).numpy()
        numpy.savez(folder / "weights.npz", **weights)
        (folder / "shape.json").write_text(json.dumps(SHAPES[shape]))
        script = Path(__file__).with_name("decode_llama_cpp.py")
        self.process = subprocess.Popen([python, script, folder / "weights.npz", folder / "shape.json", str(threads)],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.start = self.told("READY")

    def told(self, word):
        while line := self.process.stdout.readline():
            if line.startswith(word):
                return float(line.split()[1])
        raise SystemExit("llama.cpp ended")

    def answer(self, tokens):
        print(tokens, file=self.process.stdin, flush=True)
        self.told("TOOK")


def main():
    program, shape = Path(sys.argv[1]).resolve(), sys.argv[2] if len(sys.argv) > 2 else "135m"
    rounds = int(sys.argv[3]) if len(sys.argv) > 3 else 5
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    few, many = TOKENS[shape]
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        random_model(shape, folder)
        sides = {
            "hone, NF4": Hone(program, folder),
            "hone, bf16": Hone(program, folder, "--set", "QuantizationConfig.load_in_4bit=false"),
        }
        if not os.environ.get("HONE_ONLY"):
            sides["transformers, bf16"] = Transformers(folder)
        if python := os.environ.get("LLAMA_CPP_PYTHON"):
            sides["llama.cpp, q4_0"] = LlamaCpp(python, shape, folder, threads)
        speeds = {name: [] for name in sides}
        for _ in range(rounds):
            for name, side in sides.items():
                times = []
                for tokens in (few, many):
                    begun = time.perf_counter()
                    side.answer(tokens)
                    times.append(time.perf_counter() - begun)
                speeds[name].append((many - few) / (times[1] - times[0]))
        load = ", ".join(f"{number:.1f}" for number in os.getloadavg())
        print(f"{shape}, batch 1, {threads} cores, torch {torch.__version__}, transformers {transformers.__version__}, {rounds} rounds, load {load}")
        for name, side in sides.items():
            found = speeds[name]
            print(f"{name:20} {statistics.median(found):7.1f} tokens/s ({min(found):.1f} to {max(found):.1f}), "
                  f"start to first token {side.start:.2f} s")
        for side in sides.values():
            if process := getattr(side, "process", None):
                process.terminate()
                process.wait()


if __name__ == "__main__":
    main()
