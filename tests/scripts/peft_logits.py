"""Adapters trained by hone, loaded unchanged in peft: the logits that `tests/logits.rs` expects of hone's decoder.

For each case: hone trains a few steps on a checkpoint of tests/golden; `PeftModel.from_pretrained` reads the
folder over the same checkpoint in transformers; every tensor of the file must be in the model, bit for bit, and
every LoRA tensor of the model in the file; then come logits with the adapter beside the base and, for dense bases,
merged into it. A 4-bit base is bitsandbytes' on the CPU, computing in f32; merging into it quantises again, which
changes the logits by more than rounding, so that figure is printed and not recorded.

Rerun (with the versions that tests/golden/README.md names):

    cargo build
    python tests/scripts/peft_logits.py target/debug/hone [CASE ...]

A case is MODEL-QUANTIZATION: any folder of tests/golden with a model in it, and none, nf4, fp4 or stored (the
checkpoint is quantised already); without one, all that are recorded. It rewrites
tests/fixtures/peft_logits/CASE/{adapter_config.json, adapter_model.safetensors, logits.safetensors}.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import bitsandbytes
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig
from transformers.models.falcon import modeling_falcon

# transformers quantises modules that are exactly nn.Linear, and falcon's are a class of their own.
modeling_falcon.FalconLinear = torch.nn.Linear

TESTS = Path(__file__).resolve().parent.parent
FIXTURES = TESTS / "fixtures" / "peft_logits"
FOUR_BIT = ("nf4", "fp4")
SHARED_DATA = TESTS / "golden" / "_data" / "messages.parquet"

# In what a case's LoraConfig differs from rank 2 and hone's defaults: ranks by pattern, the scale of rslora, one layer
# only, the names that KAITO's presets give for phi-3.
LORA = {
    "llama3-none": {"lora_alpha": 8, "rank_pattern": {"down_proj": 4}, "alpha_pattern": {"down_proj": 20}},
    "llama3-nf4": {"lora_alpha": 4, "use_rslora": True, "exclude_modules": ["o_proj"]},
    "qwen2-nf4": {"lora_alpha": 4, "use_dora": True},
    "qwen2_tied-none": {"lora_alpha": 8, "use_dora": True, "layers_to_transform": [1]},
    "llama32_tied-none": {"lora_alpha": 8, "trainable_token_indices": [1021, 1023], "layers_to_transform": [1]},
    "mistral-nf4": {"lora_alpha": 4, "trainable_token_indices": {"embed_tokens": [510, 511], "lm_head": [511]}},
    "phi3-none": {"lora_alpha": 8, "layers_to_transform": [1]},
    "phi3-nf4": {"lora_alpha": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]},
}
# (row of tokens.jsonl, tokens of it): one row inside phi3's window of 40, one beyond it; all other windows are shorter.
ROWS = [(3, 31), (9, 100)]


def train(hone, model, quantization, lora, output):
    sections = {
        "ModelConfig": {"torch_dtype": "float32"},
        "LoraConfig": {"r": 2, **lora},
        "TrainingArguments": {
            "max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 0.01, "save_strategy": "no",
            "max_length": 64, "completion_only_loss": False,  # falcon's template rewrites what the assistant says
        },
    }
    if quantization in FOUR_BIT:
        sections["QuantizationConfig"] = {
            "load_in_4bit": True, "bnb_4bit_quant_type": quantization, "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "float32",
        }
    data = model.parent / "data.parquet"
    spec = {
        "model": str(model), "name": "model", "data": str(data if data.exists() else SHARED_DATA), "output": str(output),
        "training_config": sections,
    }
    file = output.with_suffix(".yaml")
    file.write_text(json.dumps(spec))  # JSON is YAML
    subprocess.run([hone, "run", str(file), "--quiet"], check=True)


def base(model, quantization):
    four_bit = {}  # not None: that would hide what a checkpoint says of itself
    if quantization in FOUR_BIT:
        four_bit["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=quantization, bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    config = json.loads((model / "config.json").read_text())
    auto = AutoModelForImageTextToText if "text_config" in config else AutoModelForCausalLM
    return auto.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager", device_map="cpu", **four_bit
    )


def load(model, quantization, adapter):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft only warns about missing keys
        loaded = PeftModel.from_pretrained(base(model, quantization), adapter)
    file, found = load_file(adapter / "adapter_model.safetensors"), get_peft_model_state_dict(loaded, save_embedding_layers=False)
    assert file.keys() == found.keys(), sorted(file.keys() ^ found.keys())
    assert all(torch.equal(file[name], found[name]) for name in file)
    assert any(tensor.abs().max() > 1e-3 for name, tensor in file.items() if "lora_B" in name), "nothing was learned"
    # In eval mode bitsandbytes repacks the weights for a bf16 kernel; there is no dropout to switch off.
    loaded.train()
    check_dequantization(loaded)
    return loaded


def check_dequantization(model):
    """bitsandbytes' CPU kernel is wrong for some row lengths; a fixture must not hold that."""
    for name, module in model.named_modules():
        if not isinstance(module, bitsandbytes.nn.Linear4bit):
            continue
        state, packed = module.weight.quant_state, module.weight.data.flatten()
        codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten().long()
        scales = state.absmax
        if state.nested:
            outer = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: len(scales)]
            scales = state.state2.code[scales.long()] * outer + state.offset
        expected = (state.code[codes] * scales.repeat_interleave(state.blocksize)).reshape(state.shape).to(state.dtype)
        found = bitsandbytes.functional.dequantize_4bit(module.weight.data, state)
        assert torch.equal(found, expected), name


def token_rows(model):
    lines = (model.parent / "tokens.jsonl").read_text().splitlines()
    return [json.loads(lines[row])["input_ids"][:length] for row, length in ROWS]


def logits(model, ids):
    """At the middle token and the last."""
    with torch.no_grad():
        all_positions = model(input_ids=torch.tensor([ids])).logits[0]
    return all_positions[[len(ids) // 2, len(ids) - 1]].contiguous()


def record(name, hone, scratch):
    kind, quantization = name.rsplit("-", 1)
    model, adapter, folder = TESTS / "golden" / kind / "model", scratch / name, FIXTURES / name
    train(hone, model, quantization, LORA.get(name, {}), adapter)
    loaded = load(model, quantization, adapter)
    rows, recorded, figures = token_rows(model), {}, {}
    without = base(model, quantization).train()
    for i, ids in enumerate(rows):
        recorded[f"ids_{i}"] = torch.tensor(ids, dtype=torch.uint32)
        recorded[f"logits_{i}"] = logits(loaded, ids)
        figures[f"effect of the adapter, row {i}"] = (recorded[f"logits_{i}"] - logits(without, ids)).abs().max()
    merged = loaded.merge_and_unload().train()
    for i, ids in enumerate(rows):
        found = logits(merged, ids)
        figures[f"effect of merging, row {i}"] = (recorded[f"logits_{i}"] - found).abs().max()
        if quantization == "none":
            recorded[f"merged_{i}"] = found
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in ["adapter_config.json", "adapter_model.safetensors"]:
        shutil.copy(adapter / file, folder)
    save_file(recorded, folder / "logits.safetensors")
    print(name, {key: f"{value.item():.1e}" for key, value in figures.items()}, flush=True)


def main():
    torch.set_num_threads(1)
    hone = str(Path(sys.argv[1]).resolve())
    with tempfile.TemporaryDirectory() as scratch:
        for name in sys.argv[2:] or sorted(folder.name for folder in FIXTURES.iterdir()):
            record(name, hone, Path(scratch))


main()
