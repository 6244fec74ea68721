"""What both sides of the GPU session work on: shapes, lengths of examples, token ids. Imports no torch.

`write(folder, shape)` leaves examples.json there: for each workload its steps, for each step its examples, for each example
its ids. Every token but an example's first is a target.
"""
import json
import os
import random

# Phi-3-mini-4k-instruct's config.json; `small` is the same family in a size that a CPU rehearses.
SHAPES = {
    "phi3-mini": dict(hidden_size=3072, intermediate_size=8192, num_hidden_layers=32, num_attention_heads=32,
                      num_key_value_heads=32, vocab_size=32064, sliding_window=2047, tokens=4096),
    "small": dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                  vocab_size=512, sliding_window=47, tokens=96),
}
# Midpoints of eleven equal parts of the lengths of 5,048 conversations (the dataset of KAITO's end-to-end tests,
# docker/datasets/dataset2), in characters / 4; the last is the rest to 4,096.
LENGTHS = [23, 30, 136, 202, 262, 325, 386, 469, 564, 720, 979]
RANK = 8  # and alpha: KAITO's, on all linear layers


def config(shape):
    """config.json without quantization_config."""
    facts = {key: value for key, value in SHAPES[shape].items() if key != "tokens"}
    return dict(architectures=["Phi3ForCausalLM"], model_type="phi3", hidden_act="silu", max_position_embeddings=4096,
                original_max_position_embeddings=4096, rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False,
                torch_dtype="bfloat16", bos_token_id=1, eos_token_id=2, pad_token_id=0, use_cache=False, **facts)


def lengths(tokens):
    """LENGTHS scaled to `tokens`, at least 2 each, summing to it."""
    scaled = [max(2, length * tokens // 4096) for length in LENGTHS]
    scaled[-1] += tokens - sum(scaled)
    return scaled


def workloads(shape):
    """name -> (lengths of a step's examples, steps)."""
    tokens = SHAPES[shape]["tokens"]
    timed = (8 if shape == "phi3-mini" else 2) + WARM
    return {
        "parity": (lengths(tokens // 4), 5),
        "packed": (lengths(tokens), timed),
        "long": ([tokens], timed),
        "short": ([200 * tokens // 4096], timed + 12 if shape == "phi3-mini" else timed),
    }


WARM = 3  # steps of each workload that are not timed


def write(folder, shape, seed):
    draw = random.Random(seed)
    vocab = SHAPES[shape]["vocab_size"]
    made = {}
    for name, (lengths_of_step, steps) in workloads(shape).items():
        made[name] = []
        for _ in range(steps):
            order = draw.sample(lengths_of_step, len(lengths_of_step))
            made[name].append([draw.choices(range(3, vocab), k=length) for length in order])
    with open(os.path.join(folder, "examples.json"), "w") as file:
        json.dump(made, file)
    return made


def read(folder):
    with open(os.path.join(folder, "examples.json")) as file:
        return json.load(file)


def median(values):
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
