"""What other programs make of an exported model: one JSON object on the last line.

export.py transformers MERGED [BASE ADAPTER]   logits of MERGED, compared with BASE and ADAPTER in peft
export.py gguf FILE                            keys, shapes and sums of magnitudes, by the gguf package
export.py llama.cpp FILE PROMPT COUNT [LORA]   greedy tokens, by llama.cpp (xllamacpp); PROMPT is text, or ids: 3,40,77

Needs: torch, transformers, peft; gguf; xllamacpp.
"""

import json
import sys


def with_transformers(merged, base=None, adapter=None):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    model, told = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32, output_loading_info=True)
    AutoTokenizer.from_pretrained(merged)
    GenerationConfig.from_pretrained(merged)
    ids = torch.tensor([[(at * 37 + 3) % 500 for at in range(20)]])
    found = {"missing": len(told["missing_keys"]), "unexpected": len(told["unexpected_keys"])}
    if base is not None:
        from peft import PeftModel

        other = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        other = PeftModel.from_pretrained(other, adapter).eval()
        with torch.no_grad():
            a, b = model.eval()(ids).logits, other(ids).logits
        found["difference"] = (a - b).abs().max().item()
    return found


def with_gguf(path):
    import numpy
    from gguf import GGUFReader, quants

    reader = GGUFReader(path)
    keys = {}
    for name, field in reader.fields.items():
        value = field.contents()
        if isinstance(value, (int, float, str, bool)):
            keys[name] = value
    tensors = {}
    for tensor in reader.tensors:
        values = quants.dequantize(tensor.data, tensor.tensor_type)
        tensors[tensor.name] = {
            "shape": [int(size) for size in reversed(tensor.shape.tolist())],
            "sum": float(numpy.abs(values.astype(numpy.float64)).sum()),
        }
    return {"keys": keys, "tensors": tensors}


def with_llama_cpp(path, prompt, count, lora=None):
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = 256
    params.n_gpu_layers = 0
    params.warmup = False
    params.cpuparams.n_threads = 2
    params.n_parallel = 1
    params.fit_params = False
    if lora is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(lora, 1.0)]
    server = xllamacpp.Server(params)
    ids = prompt.split(",")
    request = {
        "prompt": [int(id) for id in ids] if all(id.isdigit() for id in ids) else prompt,
        "n_predict": int(count),
        "temperature": 0,
        "top_k": 1,
        "ignore_eos": False,
        "logprobs": 1,
        "stream": False,
        "cache_prompt": False,
    }
    answer = server.handle_completions(request)
    if isinstance(answer, str):
        answer = json.loads(answer)
    tokens = [token["id"] for token in answer["choices"][0]["logprobs"]["content"]]
    return {"tokens": tokens, "prompt_tokens": answer["usage"]["prompt_tokens"]}


if __name__ == "__main__":
    kinds = {"transformers": with_transformers, "gguf": with_gguf, "llama.cpp": with_llama_cpp}
    print(json.dumps(kinds[sys.argv[1]](*sys.argv[2:]), default=str))
