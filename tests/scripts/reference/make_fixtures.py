"""Makes the fixtures of families.py again: checkpoint, recorded run, other spelling of the config.

  python make_fixtures.py GOLDEN [name ...]    # GOLDEN is tests/golden or a copy; default: all

Same versions (../../golden/README.md), same bytes of the checkpoints and adapters. A run takes about 20 s.
"""
import json, os, shutil, subprocess, sys, tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1"); os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig

import make_tiny, tok
from families import FIXTURES, LONG_RUN, VARIANTS, VOCABULARY

HERE = Path(__file__).resolve().parent
RUN = dict(batch=4, lr=2e-3, warmup=3, schedule="linear", weight_decay=0.01, r=4, alpha=8, attn="eager")


def model_class(config):
    return AutoModelForImageTextToText if "text_config" in config else AutoModelForCausalLM


def write_json(file, value):
    file.write_text(json.dumps(value, indent=2) + "\n")


def write_old_config(fixture, tokenizer, settings, folder):
    """config.json as the hub has it from transformers 4."""
    token = lambda key: tokenizer.token_to_id(settings[key]) if settings.get(key) else None
    ids = {f"{key}_id": token(key) for key in ("bos_token", "eos_token")}
    if settings.get("pad_token"): ids["pad_token_id"] = token("pad_token")
    config = json.loads(json.dumps(fixture.config))
    if "text_config" in config: config["text_config"].update(ids, torch_dtype=fixture.dtype)
    write_json(folder / "config.json", config | ids | dict(torch_dtype=fixture.dtype, transformers_version="4.51.0"))
    write_json(folder / "generation_config.json", dict(_from_model_config=True, transformers_version="4.51.0", **{k: ids[k] for k in ("bos_token_id", "eos_token_id")}))


def save_weights(tensors, shards, folder):
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names, weight_map = list(tensors), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard * len(names) // shards:(shard + 1) * len(names) // shards]
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map.update({name: file for name in part})
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    write_json(folder / "model.safetensors.index.json", dict(metadata=dict(total_size=size), weight_map=weight_map))


def store_quantised(fixture, folder):
    """Replaces the checkpoint by what transformers saves of it after bitsandbytes quantised it."""
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=fixture.stored, bnb_4bit_use_double_quant=fixture.stored == "nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, fixture.dtype), quantization_config=four_bit, device_map={"": "cpu"})
    model.train()  # in eval mode bitsandbytes repacks the weights for a kernel of its own
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)


def make_checkpoint(name, fixture, folder):
    """Also returns the config in the spelling that config.json has not."""
    folder.mkdir(parents=True)
    tokenizer, settings = tok.write(fixture.tokenizer, str(folder), VOCABULARY)
    write_old_config(fixture, tokenizer, settings, folder)
    old = json.loads((folder / "config.json").read_text())
    config = AutoConfig.from_pretrained(folder)
    seed = int.from_bytes(name.encode()[:6], "little") % 100003
    torch.manual_seed(seed)
    model = model_class(fixture.config).from_config(config, dtype=torch.float32, attn_implementation="eager")
    make_tiny.randomise(model, seed)
    losses = make_tiny.pretrain(model, tokenizer, 160)
    print(f"{name}: pre-trained {losses[0]:.3f} -> {losses[-1]:.3f}", flush=True)
    model.to(getattr(torch, fixture.dtype))
    for part in (config, *(getattr(config, key) for key in config.sub_configs)): part.dtype = getattr(torch, fixture.dtype)
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)  # names as on the hub, the new spelling of the config, no tied head
        new = json.loads((Path(saved) / "config.json").read_text())
        tensors = load_file(f"{saved}/model.safetensors")
    if fixture.names == "module":
        kept = {t.data_ptr() for n, t in model.state_dict().items() if n != "lm_head.weight"}
        tensors = {n: t.contiguous() for n, t in model.state_dict().items() if n != "lm_head.weight" or t.data_ptr() not in kept}
    save_weights(tensors, fixture.shards, folder)
    if fixture.spelling == "new": write_json(folder / "config.json", new)
    if fixture.stored:
        store_quantised(fixture, folder)
        return None
    return old if fixture.spelling == "new" else new


def record(model, run, data, out, scratch):
    arguments = [sys.executable, str(HERE / "run_ref.py"), "--model", f"models/{model}", "--data", str(data), "--out", str(out)]
    for key, value in (RUN | run).items():
        arguments += [f"--{key.replace('_', '-')}"] + ([] if value is True else [str(value)])
    subprocess.run(arguments, cwd=scratch, check=True)
    meta = json.loads((scratch / out / "meta.json").read_text())
    del meta["timing"]  # of no use, and different every time
    meta["args"]["data"] = "_data/messages.parquet"
    (scratch / out / "meta.json").write_text(json.dumps(meta, indent=1))
    debug = scratch / out / "debug.safetensors"
    if debug.exists(): save_file({name: t for name, t in load_file(debug).items() if "unquantised" not in name}, debug)


def main():
    golden = Path(sys.argv[1]).resolve()
    data = golden / "_data" / "messages.parquet"
    for name in sys.argv[2:] or [*FIXTURES, *VARIANTS]:
        with tempfile.TemporaryDirectory() as scratch:
            scratch = Path(scratch)
            other, out = None, Path("golden") / name
            if name in FIXTURES:
                fixture, target = FIXTURES[name], golden / name
                other = make_checkpoint(name, fixture, scratch / "models" / name)
                record(name, fixture.run or LONG_RUN, data, out, scratch)
                shutil.copytree(scratch / "models" / name, scratch / out / "model")
            else:
                (model, run), target = VARIANTS[name], golden / "_variants" / name
                shutil.copytree(golden / model / "model", scratch / "models" / model)
                record(model, run, data, out, scratch)
            if other: write_json(scratch / out / "config_other_spelling.json", other)
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(scratch / out, target)
            print(f"{name}: {sum(f.stat().st_size for f in target.rglob('*') if f.is_file()) / 1000:.0f} kB", flush=True)


main()
