"""Records greedy tokens of transformers' generate in f32, with adapters beside the base by peft.

Usage: python tests/scripts/generate.py tests/golden tests/fixtures/generate.json [NAME...]
Each prompt runs alone, without padding, past every end token. Adapter "a" is the recorded run's final adapter; "b" is the
same with the rows of each lora_B moved by one and its sign changed, which the test makes as well.
"""

import json
import sys
from pathlib import Path

import peft
import torch
import transformers

NAMES = ["llama3", "llama32_tied", "llama_dynamic", "llama_yarn", "phi2", "phi3", "phi3_longrope", "phi4mini", "qwen2", "qwen3", "gemma2",
         "gemma3", "falcon7b", "falcon11b", "falcon40b", "granite", "ministral", "ministral3", "mistral", "olmo2", "smollm3"]
MIXES = [{}, {"a": 1.0}, {"a": 0.3, "b": 1.0}, {"a": 0.0, "b": -0.7}]
NEW = 200
LENGTHS = [3, 20, 61]
# For prompts of this length, the log-probabilities of the tokens are recorded too, and the places at which the two best
# are this close.
SCORED = 20
CLOSE = 0.05


def second(model):
    for name, tensor in model.named_parameters():
        if ".lora_B.b." in name:
            tensor.data = -torch.roll(tensor.data, 1, 0)


def mixed(model, scales, mix):
    model.base_model.set_adapter(list(mix) or ["a"])
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            for name in ["a", "b"]:
                module.scaling[name] = scales[module, name] * mix.get(name, 0.0)


def record(folder):
    base = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation="eager").eval()
    rows = [json.loads(line)["input_ids"] for line in open(folder / "tokens.jsonl")]
    rows.sort(key=len, reverse=True)
    model = peft.PeftModel.from_pretrained(base, folder / "final_adapter", adapter_name="a")
    model.load_adapter(folder / "final_adapter", adapter_name="b")
    second(model)
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    scales = {(m, name): m.scaling[name] for m in layers for name in ["a", "b"]}
    config = transformers.GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=None)
    model.generation_config = base.generation_config = config
    cases = []
    for mix in MIXES:
        mixed(model, scales, mix)
        for row, length in zip(rows, LENGTHS):
            prompt = row[:length]
            with torch.no_grad():
                # transformers keeps the longest length that a dynamic rope has met; one short pass takes it back to
                # none.
                model(torch.tensor([prompt[:1]]))
                out = model.generate(input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                                     generation_config=config, max_new_tokens=NEW, return_dict_in_generate=True, output_logits=True)
            scores = torch.stack(out.logits).squeeze(1).log_softmax(-1)
            top = scores.topk(2, -1).values
            margins = top[:, 0] - top[:, 1]
            case = {"mix": mix, "prompt": prompt, "tokens": out.sequences[0, len(prompt):].tolist(),
                    "least_margin": float(margins.min())}
            if length == SCORED and mix in MIXES[:2]:
                case["logprobs"] = [round(float(score), 4) for score in top[:, 0]]
                case["close"] = (margins <= CLOSE).nonzero().flatten().tolist()
            cases.append(case)
    return cases


def main():
    golden, target, *names = sys.argv[1:]
    torch.set_num_threads(1)
    target = Path(target)
    found = json.loads(target.read_text()) if target.exists() else {"runs": {}}
    found["versions"] = {m.__name__: m.__version__ for m in [torch, transformers, peft]}
    for name in names or NAMES:
        found["runs"][name] = record(Path(golden) / name)
        print(name, [round(case["least_margin"], 5) for case in found["runs"][name]], flush=True)
        target.write_text(json.dumps(found, separators=(",", ":")).replace('{"mix"', '\n{"mix"') + "\n")


if __name__ == "__main__":
    main()
