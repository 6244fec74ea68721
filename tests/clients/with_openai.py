"""The official openai package: every kind of request that hone takes, and every error as the package's own class."""
import concurrent.futures
import sys

import openai

address = sys.argv[1]
client = openai.OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0, timeout=60)
ask = [{"role": "user", "content": "What is it?"}]


def chat(**more):
    return client.chat.completions.create(**{"model": "tiny", "messages": ask, "max_tokens": 12, "temperature": 0, **more})


def refused(kind, call):
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"expected {kind.__name__}")


# Models.
names = [model.id for model in client.models.list()]
assert names == ["tiny", "tuned", "half"], names
assert client.models.retrieve("tuned").id == "tuned"

# Whole answers: roles, usage, choices and seeds.
whole = chat()
assert whole.object == "chat.completion" and whole.choices[0].message.role == "assistant"
assert whole.choices[0].finish_reason in ("stop", "length")
assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
assert whole.usage.prompt_tokens_details.cached_tokens >= 0
assert chat().choices[0].message.content == whole.choices[0].message.content
assert chat(model="tuned").choices[0].message.content != whole.choices[0].message.content
several = chat(n=3, temperature=1.0, seed=7)
texts = [choice.message.content for choice in several.choices]
assert [choice.index for choice in several.choices] == [0, 1, 2] and len(set(texts)) > 1
assert [choice.message.content for choice in chat(n=3, temperature=1.0, seed=7).choices] == texts
assert chat(max_tokens=None, max_completion_tokens=3).usage.completion_tokens <= 3

# A stream is the same answer, and ends with its usage.
parts = list(chat(stream=True, stream_options={"include_usage": True}))
text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
assert text == whole.choices[0].message.content, text
assert parts[0].choices[0].delta.role == "assistant"
assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens
assert len({part.id for part in parts}) == 1
with client.chat.completions.stream(model="tiny", messages=ask, max_tokens=12, temperature=0) as stream:
    for _ in stream:
        pass
    # `get_final_completion` raises if the length was reached; the snapshot is the same without that.
    snapshot = stream.current_completion_snapshot.choices[0]
    assert (snapshot.message.content, snapshot.finish_reason) == (whole.choices[0].message.content, whole.choices[0].finish_reason)

# Stop strings are not shown.
content = whole.choices[0].message.content
stop = content[len(content) // 2:][:2]
stopped = chat(stop=[stop]).choices[0]
assert stopped.message.content == content[:content.index(stop)] and stopped.finish_reason == "stop"

# Log-probabilities.
scored = chat(logprobs=True, top_logprobs=3).choices[0].logprobs.content
assert len(scored) == whole.usage.completion_tokens
for entry in scored:
    assert entry.logprob <= 0 and len(entry.top_logprobs) == 3
    assert entry.logprob == max(top.logprob for top in entry.top_logprobs)
    assert bytes(entry.bytes).decode(errors="replace") is not None

# Tools, a call that is sent back, and text in parts.
tools = [{"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}}]
assert chat(tools=tools, tool_choice="auto").choices[0].finish_reason in ("stop", "length", "tool_calls")
call = {"id": "abc123def", "type": "function", "function": {"name": "look", "arguments": "{\"at\": 1}"}}
turns = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": [{"type": "text", "text": "Look "}, {"type": "text", "text": "there."}]},
]
assert chat(messages=turns).choices[0].message.content is not None
error = refused(openai.BadRequestError, lambda: chat(tools=tools, tool_choice="required"))
assert error.param == "tool_choice" and error.code == "unsupported_parameter", error

# The older form: texts, ids, echo with the prompt's log-probabilities.
def complete(**more):
    return client.completions.create(**{"model": "tiny", "max_tokens": 5, "temperature": 0, **more})


both = complete(prompt=["one two", "three"])
assert [choice.index for choice in both.choices] == [0, 1]
assert complete(prompt="one two").choices[0].text == both.choices[0].text
ids = [5, 9, 17, 4]
echo = complete(prompt=ids, echo=True, logprobs=2).choices[0]
assert len(echo.logprobs.tokens) == len(echo.logprobs.token_logprobs) >= len(ids)
assert echo.logprobs.token_logprobs[0] is None and all(score <= 0 for score in echo.logprobs.token_logprobs[1:])
assert len(echo.logprobs.text_offset) == len(echo.logprobs.tokens)
scores = complete(prompt=[ids, ids], echo=True, logprobs=0, max_tokens=0)
assert all(len(choice.logprobs.tokens) == len(ids) for choice in scores.choices)
text = "".join(part.choices[0].text for part in complete(prompt="one two", stream=True))
assert text == both.choices[0].text

# Fields of vLLM, and adapters by strength.
extra = chat(extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "return_token_ids": True})
assert len(extra.choices[0].token_ids) == extra.usage.completion_tokens
half = complete(prompt=ids, echo=True, logprobs=0, model="half").choices[0].logprobs.token_logprobs
mixed = complete(prompt=ids, echo=True, logprobs=0, extra_body={"adapters": [{"name": "tuned", "strength": 0.5}]})
assert mixed.choices[0].logprobs.token_logprobs == half

# Errors, each of the class that callers catch.
error = refused(openai.NotFoundError, lambda: chat(model="none"))
assert error.code == "model_not_found" and error.param == "model" and error.status_code == 404, error
error = refused(openai.BadRequestError, lambda: chat(max_tokens=10**9))
assert error.code == "context_length_exceeded", error
assert refused(openai.BadRequestError, lambda: chat(temperature=-1)).param == "temperature"
assert refused(openai.BadRequestError, lambda: chat(messages=[])).type == "invalid_request_error"
assert "json_object" in str(refused(openai.BadRequestError, lambda: chat(response_format={"type": "json_object"})))
stranger = openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0)
assert refused(openai.AuthenticationError, stranger.models.list).status_code == 401
refused(openai.PermissionDeniedError, lambda: client.post("/mixes", cast_to=object, body={"name": "x", "adapters": []}))
refused(openai.NotFoundError, lambda: client.embeddings.create(model="tiny", input="x"))

# A client that leaves in the middle frees its place; many at once are all answered as if alone.
stream = chat(stream=True, max_tokens=400, extra_body={"ignore_eos": True})
next(iter(stream))
stream.close()
with concurrent.futures.ThreadPoolExecutor(24) as pool:
    answers = list(pool.map(lambda _: chat().choices[0].message.content, range(48)))
assert set(answers) == {content}
print("openai:", openai.__version__, "is served")
