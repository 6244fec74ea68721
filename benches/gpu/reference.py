"""The reference stack's side of the GPU session: transformers + peft + bitsandbytes, as they are installed.

    reference.py prepare --shape phi3-mini --folder F --out JSON   model of random weights in bitsandbytes' 4-bit form, an
                                                                   adapter to start from, examples.json; then five steps of
                                                                   parity, in f32 and bf16, with the first step's gradients
    reference.py speed --folder F --contender NAME --out JSON      tokens/s and peak memory of one way to run it
    reference.py serve --folder F [--batches 1,32] --out JSON      tokens/s that `generate` decodes, greedy, without and with
                                                                   the adapter

Contenders: best (bf16, no checkpointing, packed, SDPA), liger (best with Liger's kernels), kaito (one example at a time,
prepare_model_for_kbit_training, checkpointing, LoRA in bf16, empty_cache after every step), unsloth. Without a GPU they
run on the CPU, liger only as far as its patches: that rehearses the script and measures nothing. Trainer's own work between steps is left out, to
the contenders' advantage.
"""
import argparse
import json
import os
import sys
import time
import traceback

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "unsloth" in sys.argv:
    import unsloth  # it wants to be first, and changes what the others are
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # KAITO sets it

import bitsandbytes.functional as four_bit
import peft
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import work

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if GPU else "cpu")
PROJECTIONS = {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"}
transformers.utils.logging.set_verbosity_error()


def quantization(compute):
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                              bnb_4bit_compute_dtype=compute)


def write_model(folder, shape, seed):
    """Weights are made, quantised and moved to the host one at a time: never more than one of them in bf16."""
    facts = work.SHAPES[shape]
    width, inner, vocab = facts["hidden_size"], facts["intermediate_size"], facts["vocab_size"]
    head = width // facts["num_attention_heads"]
    qkv = (facts["num_attention_heads"] + 2 * facts["num_key_value_heads"]) * head
    random = torch.Generator(device=DEVICE).manual_seed(seed)

    def normal(*shape, mean=0.0, deviation=0.02):
        values = torch.randn(shape, generator=random, device=DEVICE) * deviation + mean
        return values.to(torch.bfloat16)

    tensors = {"model.embed_tokens.weight": normal(vocab, width, deviation=0.5), "lm_head.weight": normal(vocab, width),
               "model.norm.weight": normal(width, mean=1.0, deviation=0.1)}
    for layer in range(facts["num_hidden_layers"]):
        path = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{path}.{norm}.weight"] = normal(width, mean=1.0, deviation=0.1)
        for name, rows, cols in (("self_attn.qkv_proj", qkv, width), ("self_attn.o_proj", width, width),
                                 ("mlp.gate_up_proj", 2 * inner, width), ("mlp.down_proj", width, inner)):
            packed, state = four_bit.quantize_4bit(normal(rows, cols), quant_type="nf4", compress_statistics=True)
            tensors[f"{path}.{name}.weight"] = packed
            for key, value in state.as_dict(packed=True).items():
                tensors[f"{path}.{name}.weight.{key}"] = value
    tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    save_file(tensors, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump(work.config(shape) | {"quantization_config": quantization(torch.bfloat16).to_dict()}, file)


def write_tokenizer(folder, shape):
    """Nothing here reads text, but unsloth loads a tokenizer with the model."""
    from tokenizers import Tokenizer, models
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, work.SHAPES[shape]["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
                                         pad_token="<unk>").save_pretrained(folder)


def load(folder, dtype):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map={"": DEVICE}, attn_implementation="sdpa")
    model.config.use_cache = False
    quantised = [module for module in model.modules() if module.__class__.__name__ == "Linear4bit"]
    expected = model.config.num_hidden_layers * len(PROJECTIONS)
    assert len(quantised) == expected, f"{len(quantised)} layers in 4 bits, expected {expected}"
    for module in quantised:
        # The stored file says bf16: f32 parity would round the backward pass's weights to it.
        module.compute_dtype = module.weight.quant_state.dtype = dtype
    for parameter in model.parameters():
        # transformers 5.24 leaves stored bf16 as it is and ignores `dtype`.
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model


def write_adapter(model, folder, seed):
    """B is not zero: otherwise the first step's gradients of A are."""
    model = peft.get_peft_model(model, lora())
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                deviation = parameter.shape[1] ** -0.5 if "lora_A" in name else 0.01
                parameter.copy_(torch.randn(parameter.shape, generator=random) * deviation)
    model.save_pretrained(os.path.join(folder, "adapter"))
    return model


def lora():
    return peft.LoraConfig(r=work.RANK, lora_alpha=work.RANK, target_modules="all-linear", task_type="CAUSAL_LM",
                           lora_dropout=0.0)


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def packed(examples):
    """One row with positions that start anew: transformers keeps attention inside each example, and a target of -100
    keeps the loss inside too."""
    ids = [token for example in examples for token in example]
    positions = [position for example in examples for position in range(len(example))]
    labels = [-100 if position == 0 else token for token, position in zip(ids, positions)]
    tensor = lambda values: torch.tensor([values], device=DEVICE)
    return dict(input_ids=tensor(ids), position_ids=tensor(positions), labels=tensor(labels))


def parity(folder, dtype, steps):
    """Losses of five steps at 1e-4, each the mean over the step's targets; one example a pass, so that nothing depends on
    how a library packs. Returns them and leaves the first step's gradients in gradients-{dtype}.safetensors."""
    name = str(dtype).removeprefix("torch.")
    model = load(folder, dtype)
    if os.path.exists(os.path.join(folder, "adapter")):
        model = peft.PeftModel.from_pretrained(model, os.path.join(folder, "adapter"), is_trainable=True)
    else:
        model = write_adapter(model, folder, seed=2)
    model.train()
    parameters = trained(model)
    assert all(parameter.dtype == torch.float32 for parameter in parameters)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
    losses, norms = [], []
    for step, examples in enumerate(steps):
        targets = sum(len(example) - 1 for example in examples)
        total = 0.0
        for example in examples:
            ids = torch.tensor([example], device=DEVICE)
            logits = model(input_ids=ids).logits[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum") / targets
            loss.backward()
            total += loss.item()
        if step == 0:
            gradients = {key.replace(".default", ""): parameter.grad.detach().cpu().contiguous().clone()
                         for key, parameter in model.named_parameters() if parameter.requires_grad}
            save_file(gradients, os.path.join(folder, f"gradients-{name}.safetensors"))
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return {"losses": losses, "gradient_norms": norms}


def prepare(options):
    os.makedirs(options.folder, exist_ok=True)
    began = time.monotonic()
    write_model(options.folder, options.shape, options.seed)
    write_tokenizer(options.folder, options.shape)
    examples = work.write(options.folder, options.shape, options.seed)
    result = {"versions": versions(), "model_seconds": time.monotonic() - began}
    torch.backends.cuda.matmul.allow_tf32 = False
    for dtype in (torch.float32, torch.bfloat16):
        result[str(dtype).removeprefix("torch.")] = parity(options.folder, dtype, examples["parity"])
        release()
    return result


def release():
    if GPU:
        torch.cuda.empty_cache()


def contender(name, folder):
    """The model ready to train, and whether a step's examples go packed or one at a time with an update each."""
    if name == "unsloth":
        model, _ = unsloth.FastLanguageModel.from_pretrained(folder, max_seq_length=4096, dtype=torch.bfloat16, load_in_4bit=True,
                                                     local_files_only=True)
        targets = sorted({path.split(".")[-1] for path in PROJECTIONS})
        model = unsloth.FastLanguageModel.get_peft_model(model, r=work.RANK, lora_alpha=work.RANK, lora_dropout=0, bias="none",
                                                 target_modules=targets, use_gradient_checkpointing="unsloth")
        return model, True
    model = load(folder, torch.bfloat16)
    if name == "kaito":
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=True,
                                                     gradient_checkpointing_kwargs={"use_reentrant": False})
        model = peft.get_peft_model(model, lora())
        for parameter in trained(model):  # what TRL does to a quantised model's adapter
            parameter.data = parameter.data.to(torch.bfloat16)
        return model, False
    if name == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_phi3
        apply_liger_kernel_to_phi3(model=model)
    return peft.get_peft_model(model, lora()), True


def train(model, optimizer, parameters, inputs, autocast):
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=autocast):
        loss = model(**inputs).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def speed(options):
    """Seconds of a step's examples, whole: inputs, passes, updates, each waited for."""
    examples = work.read(options.folder)
    began = time.monotonic()
    model, in_one_row = contender(options.contender, options.folder)
    model.train()
    parameters = trained(model)
    optimizer = torch.optim.AdamW(parameters, lr=2e-5, fused=GPU)
    kaito = options.contender == "kaito"
    result = {"contender": options.contender, "versions": versions(), "load_seconds": time.monotonic() - began,
              "trained_parameters": sum(parameter.numel() for parameter in parameters), "workloads": {}}
    if options.contender == "liger" and not GPU:
        return result | {"note": "patched; Triton's kernels need a GPU"}
    for workload in options.workloads.split(","):
        steps = examples[workload]
        if kaito and workload == "packed":  # eleven updates a step: fewer steps say as much
            steps = steps[:work.WARM + 3]
        try:
            result["workloads"][workload] = measure(model, optimizer, parameters, steps, in_one_row, kaito)
        except Exception:  # one workload that fails must not hide the others
            result["workloads"][workload] = {"error": traceback.format_exc()[-2000:]}
        save(options.out, result)
    return result


def measure(model, optimizer, parameters, steps, in_one_row, kaito):
    if GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for examples in steps:
        began = time.monotonic()
        for group in [examples] if in_one_row else [[example] for example in examples]:
            train(model, optimizer, parameters, packed(group), autocast=kaito)
            if kaito:
                release()
        if GPU:
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - began)
    timed = seconds[work.WARM:]
    tokens = sum(len(example) for example in steps[-1])
    found = {"tokens_a_step": tokens, "step_seconds_median": work.median(timed), "step_seconds": timed,
             "tokens_per_second": tokens / work.median(timed)}
    if GPU:
        free, total = torch.cuda.mem_get_info()
        found |= {"peak_allocated_bytes": torch.cuda.max_memory_allocated(),
                  "peak_reserved_bytes": torch.cuda.max_memory_reserved(), "device_used_bytes": total - free}
    return found


def serve(options):
    """`generate` of as many prompts at once as a batch has; its time for one token is taken off, so that decoding counts."""
    began = time.monotonic()
    model = load(options.folder, torch.bfloat16).eval()
    result = {"contender": "transformers + bitsandbytes", "versions": versions(), "load_seconds": time.monotonic() - began,
              "serving": []}
    cases = ["base"] + ["one adapter"] * os.path.exists(os.path.join(options.folder, "adapter"))
    for adapters in cases:
        if adapters != "base":
            model = peft.PeftModel.from_pretrained(model, os.path.join(options.folder, "adapter")).eval()
        for batch in map(int, options.batches.split(",")):
            generated(model, batch, options.prompt, 2)
            short = min(generated(model, batch, options.prompt, 1) for _ in range(2))
            long = min(generated(model, batch, options.prompt, options.tokens) for _ in range(2))
            tokens = batch * (options.tokens - 1)
            result["serving"].append({"batch": batch, "adapters": adapters, "tokens_per_second": tokens / (long - short),
                                      "seconds_to_first": short})
            save(options.out, result)
    return result


def generated(model, batch, prompt, tokens):
    """Seconds."""
    ids = torch.randint(3, model.config.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(batch)).to(DEVICE)
    if GPU:
        torch.cuda.synchronize()
    began = time.monotonic()
    with torch.inference_mode():
        found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens,
                               do_sample=False, use_cache=True, pad_token_id=0)
    if GPU:
        torch.cuda.synchronize()
    assert found.shape[1] == prompt + tokens
    return time.monotonic() - began


def versions():
    import bitsandbytes
    modules = (torch, transformers, peft, bitsandbytes)
    found = {module.__name__: module.__version__ for module in modules}
    return found | {"device": torch.cuda.get_device_name() if GPU else "cpu"}


def save(path, result):
    with open(path, "w") as file:
        json.dump(result, file, indent=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["prepare", "speed", "serve"])
    parser.add_argument("--shape", default="phi3-mini", choices=sorted(work.SHAPES))
    parser.add_argument("--folder", required=True)
    parser.add_argument("--contender", choices=["best", "liger", "kaito", "unsloth"])
    parser.add_argument("--workloads", default="packed,long,short")
    parser.add_argument("--batches", default="1,32")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    save(options.out, {"prepare": prepare, "speed": speed, "serve": serve}[options.what](options))
