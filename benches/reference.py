"""The reference stack at the same work as `benches/step.rs`: transformers + peft + bitsandbytes on a CPU.

    python benches/reference.py --dtype float32|bfloat16 --examples 4 --tokens 512 --steps 4

Needs torch 2.11, transformers 5.14, peft 0.21, bitsandbytes 0.50. Prints one JSON line; the first step is not counted.
"""
import argparse
import json
import resource
import tempfile
import time

import bitsandbytes  # noqa: F401
import peft
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("--dtype", default="float32")
parser.add_argument("--examples", type=int, default=4)
parser.add_argument("--tokens", type=int, default=512)
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--model", help="a model folder instead of a random 88M Llama")
parser.add_argument("--save", help="folder for the adapter: with --model, a whole smoke job")
options = parser.parse_args()
torch.set_num_threads(options.threads)
torch.manual_seed(1)
dtype = getattr(torch, options.dtype)
config = LlamaConfig(vocab_size=8192, hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
                     num_attention_heads=12, num_key_value_heads=4, rms_norm_eps=1e-5, rope_theta=500000.0, use_cache=False)
with tempfile.TemporaryDirectory() as folder:
    if not options.model:
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                      bnb_4bit_compute_dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(options.model or folder, dtype=dtype, quantization_config=quantization,
                                                 device_map={"": "cpu"}, attn_implementation="sdpa")
model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
model = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
model.train()
parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(parameters, lr=1e-4)
seconds = []
for step in range(options.steps + 1):
    ids = torch.tensor([[(i * i * 7 + i * 31 + example * 131 + step * 17) % model.config.vocab_size for i in range(options.tokens)]
                        for example in range(options.examples)])
    began = time.monotonic()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=options.dtype == "bfloat16"):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    seconds.append(time.monotonic() - began)
if options.save:
    model.save_pretrained(options.save)
counted = sorted(seconds[1:])
median = counted[len(counted) // 2]
print(json.dumps({"dtype": options.dtype, "examples": options.examples, "tokens": options.tokens, "step_seconds_median": median,
                  "step_seconds_min": counted[0], "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                  "loss": loss.item(), "tokens_per_s": options.examples * options.tokens / median}))
