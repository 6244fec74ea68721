"""Rotary frequencies and attention factors as transformers computes them: tests/fixtures/rope.json.

Each case is a config.json (only what rope reads) in the spelling of some model on the hub, with the lengths at which
its frequencies are taken. Run: python tests/scripts/rope_frequencies.py > tests/fixtures/rope.json
"""

import json

import torch
import transformers
from transformers import Gemma3TextConfig, LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

BASE = {"hidden_size": 128, "num_attention_heads": 2, "head_dim": 64, "max_position_embeddings": 256}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SHORT, LONG = [1.0 + 0.01 * i for i in range(24)], [1.0 + 0.5 * i for i in range(24)]
LONGROPE = {"type": "longrope", "short_factor": SHORT, "long_factor": LONG}

CASES = {
    "plain": (LlamaConfig, {"rope_theta": 500000.0}, [8]),
    "plain, new spelling": (LlamaConfig, {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}, [8]),
    "linear": (LlamaConfig, {"rope_scaling": {"type": "linear", "factor": 3.0}}, [8]),
    "dynamic": (LlamaConfig, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, [8, 256, 300, 1000]),
    "dynamic, new spelling": (
        LlamaConfig,
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e6}},
        [8, 257],
    ),
    "llama3": (
        LlamaConfig,
        {
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        [8],
    ),
    "yarn": (LlamaConfig, {"rope_scaling": YARN}, [8, 256]),
    "yarn, old spelling": (
        LlamaConfig,
        {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
        [8],
    ),
    "yarn, positions of the top level": (LlamaConfig, {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, [8]),
    "yarn, attention_factor": (LlamaConfig, {"rope_scaling": YARN | {"attention_factor": 0.75}}, [8]),
    "yarn, betas": (LlamaConfig, {"rope_scaling": YARN | {"beta_fast": 20.0, "beta_slow": 2.0}}, [8]),
    "yarn, not truncated": (LlamaConfig, {"rope_parameters": YARN | {"truncate": False, "rope_theta": 150000.0}}, [8]),
    "yarn, mscale": (LlamaConfig, {"rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 1.3}}, [8]),
    "yarn, mscale alone": (LlamaConfig, {"rope_scaling": YARN | {"mscale": 0.707}}, [8]),
    "yarn, factor 1": (LlamaConfig, {"rope_scaling": YARN | {"factor": 1.0}}, [8]),
    "yarn, one step of a ramp": (
        LlamaConfig,
        {"rope_scaling": YARN | {"original_max_position_embeddings": 4, "beta_fast": 1.0, "beta_slow": 1.0}},
        [8],
    ),
    "longrope, partial": (
        Phi3Config,
        {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 64, "rope_scaling": LONGROPE},
        [8, 64, 65],
    ),
    "longrope, new spelling": (
        Phi3Config,
        {
            "original_max_position_embeddings": 64,
            "rope_parameters": LONGROPE | {"rope_theta": 10000.0, "partial_rotary_factor": 0.75},
        },
        [8, 65],
    ),
    "gemma3": (
        Gemma3TextConfig,
        {"rope_theta": 1e6, "rope_local_base_freq": 10000.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        [8],
    ),
    "gemma3, new spelling": (
        Gemma3TextConfig,
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            }
        },
        [8],
    ),
}


def plain(config, layers):
    parameters = config.rope_parameters[layers] if layers else config.rope_parameters
    width = int(config.head_dim * parameters.get("partial_rotary_factor", 1.0))
    return 1.0 / (parameters["rope_theta"] ** (torch.arange(0, width, 2).float() / width)), 1.0


def frequencies(config, length, layers):
    parameters = config.rope_parameters[layers] if layers else config.rope_parameters
    kind = parameters["rope_type"]
    if kind == "default":
        return plain(config, layers)
    # A model hands over the tensor of its longest position.
    length = torch.tensor(length) if kind == "dynamic" else length
    return ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length, layer_type=layers)


def main():
    cases = []
    for name, (kind, extra, lengths) in CASES.items():
        written = BASE | extra
        for layers in ["full_attention", "sliding_attention"] if kind is Gemma3TextConfig else [None]:
            # A config reads its arguments and changes them.
            config = kind(**json.loads(json.dumps(written)))
            for length in lengths:
                found, attention = frequencies(config, length, layers)
                cases.append(
                    {
                        "name": name,
                        "family": kind.model_type,
                        "layers": layers,
                        "config": written,
                        "length": length,
                        "frequencies": found.tolist(),
                        "attention": attention,
                    }
                )
    lines = ",\n".join(json.dumps(case) for case in cases)
    print(f'{{"transformers": "{transformers.__version__}", "cases": [\n{lines}\n]}}')


main()
