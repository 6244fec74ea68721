"""Writes tests/fixtures/generation_marks.json: templates with `{% generation %}` x random conversations, and the mask of the
assistant's tokens that transformers makes of each.

    python tests/scripts/generation_marks.py TRL > tests/fixtures/generation_marks.json
    (transformers 5.14.1, tokenizers 0.22.2; TRL: trl/chat_templates of trl 1.16.0)

Contents are often pieces of what the templates themselves write. The tokenizer is that of tests/golden/llama3. A mask is a list
of runs: the first and the last token of each.
"""
import json
import random
import sys
import jinja2
from transformers import AutoTokenizer

TEMPLATES = ["llama3", "phi3", "phi3_5", "gemma", "gemma3", "qwen2_5", "qwen3", "qwen3_instruct_2507",
             "deepseek_r1_distill", "cohere", "lfm2"]
TALKS = 24
WORDS = ["end", "B", "d", "a", "user", "assistant", "<|end|>", "yes", "Größe 日本", "line\nline", "  spaced  ", "<|eot_id|>",
         "{% generation %}", "\n\nmodel\n", "Two sentences. And one more, with 3 numbers: 1 22 333."]


def content(rng, source):
    if rng.random() < 0.5:
        return rng.choice(WORDS)
    while True:
        start = rng.randrange(len(source))
        text = source[start:start + rng.randint(1, 12)]
        if text.strip():
            return text


def talk(rng, source):
    turns = [{"role": "system", "content": content(rng, source)}] if rng.random() < 0.25 else []
    for _ in range(rng.randint(1, 3)):
        turns.append({"role": "user", "content": content(rng, source)})
        turns.append({"role": "assistant", "content": content(rng, source)})
    return turns


def runs(mask):
    found = []
    for index, learned in enumerate(mask):
        if learned and index and mask[index - 1]:
            found[-1][1] = index
        elif learned:
            found.append([index, index])
    return found


def main(folder):
    tokenizer = AutoTokenizer.from_pretrained("tests/golden/llama3/model")
    templates = {name: open(f"{folder}/{name}_training.jinja").read() for name in TEMPLATES}
    cases = []
    for name, template in templates.items():
        rng = random.Random(name)
        sample = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]
        source = tokenizer.apply_chat_template(sample, chat_template=template, tokenize=False)
        for _ in range(TALKS):
            messages = talk(rng, source)
            try:
                made = tokenizer.apply_chat_template(messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True)
            except (jinja2.exceptions.TemplateError, TypeError) as error:
                cases.append({"template": name, "messages": messages, "refused": str(error)})
                continue
            cases.append({"template": name, "messages": messages, "tokens": len(made["input_ids"]), "learned": runs(made["assistant_masks"])})
    print('{"templates": ' + json.dumps(templates, ensure_ascii=False) + ',\n "cases": [\n'
          + ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases) + "\n]}")


main(*sys.argv[1:])
