"""Writes tests/fixtures/chat_templates.json: real chat templates x conversations rendered by transformers.

    python tests/scripts/chat_templates.py TRL LLAMA_CPP > tests/fixtures/chat_templates.json
    (transformers 5.14.1, jinja2 3.1.6; TRL: trl/chat_templates of trl 1.16.0; LLAMA_CPP: vendor/llama.cpp/models/templates
    of llama-cpp-python 0.3.36)

The templates are those that the models' publishers ship, as these two packages carry them. Those under WRITTEN are in no
package: they are written from the models' published prompt formats. Dates come from `strftime_now`, so it is fixed.
"""
import datetime
import json
import sys
import jinja2
from transformers.utils import chat_template_utils

TRL = {
    "llama-3": "llama3", "llama-3.1": "llama3_1", "llama-3.2": "llama3_2", "gemma-2": "gemma", "gemma-3": "gemma3",
    "phi-3": "phi3", "phi-3.5": "phi3_5", "qwen2.5": "qwen2_5", "qwen3": "qwen3", "qwen3-2507": "qwen3_instruct_2507",
    "deepseek-r1-distill": "deepseek_r1_distill",
}
LLAMA_CPP = {
    "llama-3.3": "meta-llama-Llama-3.3-70B-Instruct", "mistral-nemo": "mistralai-Mistral-Nemo-Instruct-2407",
    "mistral-small-3.2": "Mistral-Small-3.2-24B-Instruct-2506", "ministral-3": "mistralai-Ministral-3-14B-Reasoning-2512",
    "granite-3.3": "ibm-granite-granite-3.3-2B-Instruct", "granite-4.1": "ibm-granite-granite-4.1",
    "smollm3": "HuggingFaceTB-SmolLM3-3B", "qwq": "Qwen-QwQ-32B", "hermes-3": "NousResearch-Hermes-3-Llama-3.1-8B-tool_use",
}
WRITTEN = {
    "phi-4": "{% for message in messages %}{% if (message['role'] == 'system') %}{{'<|im_start|>system<|im_sep|>' + message['content'] + '<|im_end|>'}}{% elif (message['role'] == 'user') %}{{'<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|>'}}{% elif (message['role'] == 'assistant') %}{{'<|im_start|>assistant<|im_sep|>' + message['content'] + '<|im_end|>'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}",
    "olmo-2": "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ '<|system|>\n' + message['content'] + '\n' }}{% elif message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + '\n' }}{% elif message['role'] == 'assistant' %}{% if not loop.last %}{{ '<|assistant|>\n'  + message['content'] + eos_token + '\n' }}{% else %}{{ '<|assistant|>\n'  + message['content'] + eos_token }}{% endif %}{% endif %}{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}",
    "falcon-instruct": "{% for message in messages %}{% if not loop.first %}{{ '\n\n' }}{% endif %}{% if message['role'] == 'system' %}{{ message['content'] | trim }}{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'].replace('\r\n', '\n').replace('\n\n', '\n') | trim }}{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] | trim }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}",
    "marked-chatml": "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "The weather of a place, é.", "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "The place"}, "days": {"type": "integer", "default": 1}}, "required": ["city"]}}}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "id": "abcdefghi", "function": {"name": "get_weather", "arguments": {"city": "Zürich", "days": 2, "exact": 0.5, "now": True}}}]}
RESULT = {"role": "tool", "name": "get_weather", "tool_call_id": "abcdefghi", "content": "{\"sky\": \"clear\"}"}


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


TALKS = [
    {"messages": [turn("user", "2+2?"), turn("assistant", "4")]},
    {"messages": [turn("system", "Be brief."), turn("user", "Größe? 日本"), turn("assistant", " Ein Meter.\n"), turn("user", "end"), turn("assistant", "end")]},
    {"messages": [turn("system", ""), turn("user", "a"), turn("assistant", "b")]},
    {"messages": [turn("user", "Why?"), turn("assistant", "<think>\nhm, 2\n</think>\n\nTwo."), turn("user", "Again?"), turn("assistant", "<think>\nstill\n</think>\n\nTwo.")]},
    {"messages": [turn("user", "Why?"), turn("assistant", "Two.", reasoning_content="hm, 2"), turn("user", "Again?"), turn("assistant", "Three.", reasoning_content="no")]},
    {"messages": [turn("user", "Weather?"), CALL, RESULT, turn("assistant", "Clear.")], "tools": [WEATHER]},
    {"messages": [turn("system", "Use tools."), turn("user", "Weather?"), CALL, RESULT, turn("assistant", "Clear."), turn("user", "Thanks"), turn("assistant", "Bye")], "tools": [WEATHER]},
    {"messages": [turn("user", "2+2?"), turn("assistant", "4")], "variables": {"enable_thinking": False, "thinking": True}},
    {"messages": [turn("user", "only a question")]},
]
SPECIALS = {"bos_token": "<s>", "eos_token": "</s>"}
SECONDS = 1721998984


class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(SECONDS, datetime.timezone.utc)


def main(trl, llama_cpp):
    chat_template_utils.datetime = Clock
    templates = {name: open(f"{trl}/{file}.jinja").read() for name, file in TRL.items()}
    templates |= {name: open(f"{llama_cpp}/{file}.jinja").read() for name, file in LLAMA_CPP.items()}
    templates |= WRITTEN
    templates["phi-4-mini"] = json.load(open("tests/golden/phi4mini/model/tokenizer_config.json"))["chat_template"]
    cases = []
    for name, template in templates.items():
        for number, talk in enumerate(TALKS):
            if name == "hermes-3" and "tools" not in talk:
                continue  # its name on the hub is tool_use: it is taken for talks with tools only
            for prompt in (False, True):
                case = {"template": name, "talk": number, "add_generation_prompt": prompt}
                try:
                    text, spans = chat_template_utils.render_jinja_template(
                        [talk["messages"]], tools=talk.get("tools"), chat_template=template, add_generation_prompt=prompt,
                        return_assistant_tokens_mask="endgeneration" in template, **SPECIALS, **talk.get("variables", {}))
                    case["text"] = text[0]
                    if spans:
                        case["answers"] = [text[0][a:b] for a, b in spans[0]]
                except (jinja2.exceptions.TemplateError, TypeError) as error:
                    case["refused"] = str(error)
                cases.append(case)
    fixture = {"specials": SPECIALS, "seconds": SECONDS, "templates": templates, "talks": TALKS, "cases": cases}
    print(json.dumps(fixture, ensure_ascii=False, indent=1))


main(*sys.argv[1:])
