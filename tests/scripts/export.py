"""What other programs make of an exported model: one JSON object on the last line.

export.py transformers MERGED [BASE ADAPTER]   logits of MERGED, compared with BASE and ADAPTER in peft
export.py gguf FILE                            keys, shapes and sums of magnitudes, by the gguf package
export.py llama.cpp FILE PROMPT COUNT [LORA]   greedy tokens, by llama.cpp (xllamacpp); PROMPT is text, or ids: 3,40,77
export.py tokens FILE TEXTS                    ids of a JSON list of texts, by llama.cpp

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


def llama_cpp(path, lora=None):
    """A server on a free port, and a function that asks it."""
    import socket
    import urllib.request

    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = 256
    params.n_gpu_layers = 0
    params.warmup = False
    params.cpuparams.n_threads = 2
    params.n_parallel = 1
    params.fit_params = False
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        params.port = free.getsockname()[1]
    if lora is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(lora, 1.0)]
    server = xllamacpp.Server(params)

    def ask(route, body):
        url = f"{server.listening_address}{route}"
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=120) as answer:
            return json.load(answer)

    return server, ask


def with_llama_cpp(path, prompt, count, lora=None):
    server, ask = llama_cpp(path, lora)
    ids = prompt.split(",")
    request = {
        "prompt": [int(id) for id in ids] if all(id.isdigit() for id in ids) else prompt,
        "n_predict": int(count),
        "temperature": 0,
        "top_k": 1,
        "ignore_eos": False,
        # The list of log-probabilities leaves out tokens whose text is no whole letter; this list is complete.
        "return_tokens": True,
        "cache_prompt": False,
    }
    answer = ask("/completion", request)
    return {"tokens": answer["tokens"], "prompt_tokens": answer["tokens_evaluated"]}


def tokens_of_llama_cpp(path, texts):
    server, ask = llama_cpp(path)
    asked = lambda text: ask("/tokenize", {"content": text, "add_special": False, "parse_special": False})
    return [asked(text)["tokens"] for text in json.loads(texts)]


if __name__ == "__main__":
    kinds = {"transformers": with_transformers, "gguf": with_gguf, "llama.cpp": with_llama_cpp, "tokens": tokens_of_llama_cpp}
    print(json.dumps(kinds[sys.argv[1]](*sys.argv[2:]), default=str))
