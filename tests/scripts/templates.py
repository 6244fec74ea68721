"""Writes tests/fixtures/templates.json: chat templates x conversations rendered by transformers, to compare with.

    python tests/scripts/templates.py > tests/fixtures/templates.json      (transformers 5.14.1, jinja2 3.1.6)

Each template is ours and uses constructs that a family's template uses. `strftime_now` is not among them: its
result changes by the day.
"""
import json
import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

TEMPLATES = {
    "llama3": open("tests/golden/llama3/model/tokenizer_config.json"),
    "phi3": open("tests/golden/phi3/model/tokenizer_config.json"),
    "chatml": """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "qwen_default_system": """{%- if messages[0].role == 'system' -%}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- else %}
    {{- '<|im_start|>system\nBe helpful.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
""",
    "thinking": """{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or (not loop.last and reasoning_content)) %}
            {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}""",
    "mistral": """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, roles must alternate user/assistant") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, got " + message.role + "!") }}
    {%- endif %}
{%- endfor %}
""",
    "gemma": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '
' + message['content'] | trim + '<end_of_turn>
' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model
'}}{% endif %}""",
    "generation": """{%- for message in messages -%}
    {%- if message.role == 'assistant' -%}
        {{- '<|assistant|>\n' -}}
        {%- generation -%}
        {{- message.content + '<|end|>' -}}
        {%- endgeneration -%}
        {{- '\n' -}}
    {%- else -%}
        {{- '<|' ~ message.role ~ '|>\n' ~ message.content ~ '<|end|>\n' -}}
    {%- endif -%}
{%- endfor -%}""",
    "generation_plain_crlf": "{% for message in messages %}\r\n{% if message.role == 'assistant' %}\r\n  A: {% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}\r\n\r\n{% else %}\r\n  {{ message.role | capitalize }}: {{ message.content }}\r\n{% endif %}\r\n{% endfor %}\r\n",
    "macro_json": """{#- comment -#}
{%- macro turn(message, last=false) -%}
<{{ message.role | upper }}>{{ message.content | tojson }}{% if last %}.{% endif %}
{%- endmacro -%}
{%- for message in messages %}
{{ turn(message, loop.last) }}
    {% if loop.index > 3 %}{% break %}{% endif %}
{% endfor %}
{{ messages | map(attribute='role') | join(',') }} {{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{{ {'a': [1, none, true, 'é<'], 'b': {}} | tojson(indent=2) }} {{ none }} {{ true }} {{ [1, 'a', none] }} {{ {'k': 'v'} }} {{ 7 // 2 }} {{ 2.0 }}
{%+ if tools %}tools{% endif %}
{{ messages[-1].content[:5] }}|{{ messages[0].content.split()[0].title() }}|{{ '%s-%d' | format('x', 3) }}|{{ 'a' in 'cat' }}
""",
}


def conversation(*contents, system=None):
    roles = ["user", "assistant"]
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + turns


CONVERSATIONS = [
    conversation("2+2?", "4"),
    conversation("  spaces \n around \t", "\n\nkept? or 'trimmed' \"here\" <&> \\ \n", system="Be brief."),
    conversation("Größe? 日本 🙂", "Ünïcode — ok 👍🏽", "And then?", "Nothing.", "Why?", "Because\r\nso."),
    conversation("Think!", "<think>\nhm, 2\n</think>\n\nTwo.", "Again?", "<think>still 2</think>\nTwo again."),
    conversation("only a question"),
    [{"role": "assistant", "content": "I speak first."}, {"role": "user", "content": "ok"}],
]
SPECIALS = {"bos_token": "<s>", "eos_token": "</s>"}


def main():
    cases = []
    for name, template in TEMPLATES.items():
        if not isinstance(template, str):
            template = json.load(template)["chat_template"]
        for number, messages in enumerate(CONVERSATIONS):
            for prompt in (False, True):
                case = {"name": f"{name}/{number}{'+' if prompt else ''}", "template": name, "messages": number, "add_generation_prompt": prompt}
                try:
                    text, spans = render_jinja_template(
                        [messages], chat_template=template, add_generation_prompt=prompt,
                        return_assistant_tokens_mask="endgeneration" in template, **SPECIALS)
                    case["text"] = text[0]
                    if spans:
                        case["answers"] = [text[0][a:b] for a, b in spans[0]]
                except jinja2.exceptions.TemplateError as error:
                    case["refused"] = str(error)
                cases.append(case)
        TEMPLATES[name] = template
    print(json.dumps({"specials": SPECIALS, "templates": TEMPLATES, "conversations": CONVERSATIONS, "cases": cases}, ensure_ascii=False, indent=1))


main()
