"""A parquet file of conversations of any size with a tokenizer, and Hugging Face's side of the comparison.

    python benches/data.py make FOLDER --gigabytes 2.5 [--tokenizer sentence-piece]
    python benches/data.py reference FOLDER [--rows N]

`make` writes rows.parquet and a model's small files (a byte-level BPE of 32,000 tokens, trained on the same text, ChatML with
generation marks; or SentencePiece's form of BPE, as Llama 2 and Phi-3 have it). `reference` does what TRL's SFTTrainer does to such data: `datasets` reads the file, `apply_chat_template` makes
ids and the mask of the assistant's tokens, in one process a core, and the result goes to `datasets`' own cache. Its last line is JSON.
"""
import argparse
import json
import os
import random
import resource
import shutil
import string
import time

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>\\n' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
)


UNIQUE_ROWS = 60_000


def words(rng, count):
    """Made of syllables, by a Zipf law, as frequent as words of a language are."""
    syllables = [a + b for a in "bcdfghklmnprstvw" for b in ("a", "e", "i", "o", "u", "an", "er", "in", "on", "st")]
    made = sorted({"".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(count)}, key=len)
    weights = [1 / (rank + 2.7) for rank in range(len(made))]
    return made, weights


def sentences(rng, count):
    made, weights = words(rng, 60_000)
    out = []
    for _ in range(count):
        some = rng.choices(made, weights, k=rng.randint(5, 24))
        if rng.random() < 0.1:
            some[-1] = str(rng.randint(0, 99999))
        if rng.random() < 0.05:
            some.append("`" + "".join(rng.choices(string.ascii_lowercase + "-_./", k=12)) + "`")
        out.append(" ".join(some).capitalize() + rng.choice(".... ?!:"))
    return out


def byte_level(texts, specials, path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=32_000, special_tokens=specials, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(path)


def sentence_piece(texts, specials, path):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    octets = [f"<0x{octet:02X}>" for octet in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=32_000, special_tokens=["<unk>", *octets, *specials], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    # Words were only for the training. The saved tokenizer sees a text as a whole, as the converted tokenizers of the
    # hub do.
    made = json.loads(tokenizer.to_str())
    mark = "\u2581"
    made["normalizer"] = {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": mark}, {"type": "Replace", "pattern": {"String": " "}, "content": mark}]}
    made["pre_tokenizer"] = None
    made["model"] |= {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    made["added_tokens"] = [token for token in made["added_tokens"] if token["content"] not in octets]
    json.dump(made, open(path, "w"), ensure_ascii=False)


def make(folder, gigabytes, kind):
    import pyarrow
    import pyarrow.parquet

    os.makedirs(folder, exist_ok=True)
    rng = random.Random(7)
    pool = sentences(rng, 200_000)
    text = lambda low, high: " ".join(rng.choices(pool, k=rng.randint(low, high)))
    message = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])
    schema = pyarrow.schema([("messages", pyarrow.list_(message))])
    path = os.path.join(folder, "rows.parquet")
    rows = []
    for _ in range(UNIQUE_ROWS):
        turns = [{"role": "system", "content": "You answer briefly."}] if rng.random() < 0.3 else []
        for _ in range(rng.randint(1, 3)):
            turns.append({"role": "user", "content": text(1, 4)})
            turns.append({"role": "assistant", "content": text(2, 14)})
        rows.append(turns)
    table = pyarrow.table({"messages": pyarrow.array(rows, schema.field(0).type)}, schema)
    # Neither side remembers rows, only words: the same rows in another order cost what new ones do.
    with pyarrow.parquet.ParquetWriter(path, schema, compression="snappy", use_dictionary=False) as writer:
        while os.path.getsize(path) < gigabytes * 1e9:
            writer.write_table(table.take(pyarrow.array(rng.sample(range(UNIQUE_ROWS), UNIQUE_ROWS))), 20_000)
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    write = sentence_piece if kind == "sentence-piece" else byte_level
    write(pool[:100_000], specials, os.path.join(folder, "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
              "chat_template": TEMPLATE, "model_max_length": 4096}
    json.dump(config, open(os.path.join(folder, "tokenizer_config.json"), "w"))
    print(json.dumps({"bytes": os.path.getsize(path)}))


def cpu_seconds():
    """Of this process and of those that it has waited for."""
    times = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(time.ru_utime + time.ru_stime for time in times)


def reference(folder, rows, tokens_max):
    import datasets
    import transformers

    # Everything anew: nothing of an earlier run is taken from its cache.
    cache = os.path.join(folder, "hf-cache")
    shutil.rmtree(cache, ignore_errors=True)
    began, cpu_before = time.monotonic(), cpu_seconds()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    split = f"train[:{rows}]" if rows else "train"
    data = datasets.load_dataset("parquet", data_files=os.path.join(folder, "rows.parquet"), split=split, cache_dir=cache)
    loaded = time.monotonic()

    def tokens(row):
        made = tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
        return {"input_ids": made["input_ids"][:tokens_max], "assistant_masks": made["assistant_masks"][:tokens_max]}

    done = data.map(tokens, remove_columns=data.column_names, num_proc=os.cpu_count())
    seconds, cpu = time.monotonic() - began, cpu_seconds() - cpu_before
    count = sum(len(ids) for batch in done.iter(1000) for ids in batch["input_ids"])
    own, children = (resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(json.dumps({"rows": len(done), "tokens": count, "seconds": round(seconds, 2),
                      "cpu_seconds": round(cpu, 2), "tokens_per_cpu_s": round(count / cpu), "load_seconds": round(loaded - began, 2),
                      "tokens_per_s": round(count / seconds), "tokens_per_s_without_load": round(count / (seconds - loaded + began)),
                      "peak_mb_of_one_process": round(max(own, children)),
                      "datasets": datasets.__version__, "transformers": transformers.__version__}))
    shutil.rmtree(cache, ignore_errors=True)


parser = argparse.ArgumentParser()
parser.add_argument("what", choices=["make", "reference"])
parser.add_argument("folder")
parser.add_argument("--gigabytes", type=float, default=2.5)
parser.add_argument("--tokenizer", choices=["byte-level", "sentence-piece"], default="byte-level")
parser.add_argument("--rows", type=int, default=0)
parser.add_argument("--tokens-max", type=int, default=1024)
if __name__ == "__main__":
    options = parser.parse_args()
    if options.what == "make":
        make(options.folder, options.gigabytes, options.tokenizer)
    else:
        reference(options.folder, options.rows, options.tokens_max)
