"""llama.cpp's side of benches/decode.py: a random Llama in q4_0 (the embedding, too), asked by lines.

Usage: python benches/decode_llama_cpp.py WEIGHTS.npz SHAPE.json THREADS     then a number of tokens a line -> seconds

Needs xllamacpp, gguf and numpy.
"""
import json
import sys
import time
from pathlib import Path

import gguf
import numpy
import xllamacpp

PROMPT = [(7 * at) % 400 + 3 for at in range(64)]


def write(weights, shape, path):
    writer = gguf.GGUFWriter(path, "llama")
    heads, key_heads, width = shape["num_attention_heads"], shape["num_key_value_heads"], shape["hidden_size"]
    head = shape.get("head_dim", width // heads)
    writer.add_context_length(shape["max_position_embeddings"])
    writer.add_embedding_length(width)
    writer.add_block_count(shape["num_hidden_layers"])
    writer.add_feed_forward_length(shape["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{number}" for number in range(shape["vocab_size"])])
    writer.add_token_types([1] * shape["vocab_size"])
    writer.add_token_merges(["t 1"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, shape["num_hidden_layers"])
    for name in weights.files:
        values = weights[name].astype(numpy.float32)
        count = {"q_proj": heads, "k_proj": key_heads}.get(name.split(".")[-2])
        if count:  # The two halves of a head alternate in llama.cpp.
            values = values.reshape(count, 2, head // 2, -1).swapaxes(1, 2).reshape(values.shape)
        to = names.get_name(name, try_suffixes=(".weight",))
        if values.ndim == 1:
            writer.add_tensor(to, values)
        else:
            kind = gguf.GGMLQuantizationType.Q4_0
            writer.add_tensor(to, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    path = Path(sys.argv[1]).with_suffix(".gguf")
    write(numpy.load(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), path)
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_gpu_layers, params.n_parallel = str(path), 512, 0, 1
    params.warmup = params.fit_params = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(sys.argv[3])
    begun = time.perf_counter()
    server = xllamacpp.Server(params)

    def answer(tokens):
        found = server.handle_completions({"prompt": PROMPT, "n_predict": tokens, "temperature": 0, "top_k": 1, "ignore_eos": True,
                                           "stream": False, "cache_prompt": False, "max_tokens": tokens})
        found = json.loads(found) if isinstance(found, str) else found
        assert found["usage"]["completion_tokens"] == tokens, found["usage"]

    answer(1)
    print("READY", time.perf_counter() - begun, flush=True)
    for line in sys.stdin:
        begun = time.perf_counter()
        answer(int(line))
        print("TOOK", time.perf_counter() - begun, flush=True)


main()
