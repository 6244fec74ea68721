"""What no client should send, sent to a real server: each gets OpenAI's error and the right status, and the server lives.

Usage: python tests/clients/attack.py ADDRESS PID
"""
import json
import os
import socket
import sys
import time

host, port = sys.argv[1].removeprefix("http://").split(":")
pid = int(sys.argv[2])
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
QUESTION = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "temperature": 0}
PROMPT = {"prompt": [5, 6], "max_tokens": 2, "temperature": 0}


def send(data, timeout=60, half=False):
    """Raw bytes -> everything that came back."""
    with socket.create_connection((host, int(port)), timeout) as stream:
        found = b""
        try:
            stream.sendall(data)
            if half:
                stream.shutdown(socket.SHUT_WR)
            while part := stream.recv(1 << 16):
                found += part
        except (ConnectionError, socket.timeout):
            pass
        return found


def head(method, path, length, more="", version="1.1"):
    return (f"{method} {path} HTTP/{version}\r\nhost: h\r\nauthorization: Bearer secret\r\nconnection: close\r\n{more}"
            f"content-length: {length}\r\n\r\n").encode()


def post(path, body, more=""):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    found = send(head("POST", path, len(body), more) + body)
    top, _, rest = found.partition(b"\r\n\r\n")
    return (int(top.split()[1]) if top else 0), top.decode("latin-1").lower(), rest


def refused(name, path, body, *statuses):
    status, _, text = post(path, body)
    assert status in statuses, (name, status, text[:300])
    error = json.loads(text)["error"]
    assert error["message"] and error["type"] and {"param", "code"} <= set(error), (name, error)


def every_field_of_every_type():
    """A value of each type in each field: an answer, or an error that names the field."""
    values = [None, True, 0, -1, 1.5, 1e308, -1e308, 2**63, "", "x", "NaN", [], [None], [[[]]], {}, {"a": {}}, ["x"] * 40, "\x00", "\ud7ff"]
    fields = {
        CHAT: "model messages max_tokens max_completion_tokens min_tokens temperature top_p top_k min_p n stop stop_token_ids ignore_eos seed "
              "stream stream_options logprobs top_logprobs logit_bias presence_penalty frequency_penalty repetition_penalty adapters tools "
              "tool_choice parallel_tool_calls response_format add_generation_prompt continue_final_message chat_template "
              "chat_template_kwargs documents skip_special_tokens return_token_ids prompt_logprobs user metadata store",
        TEXT: "model prompt max_tokens temperature top_p n stop echo logprobs suffix best_of logit_bias seed stream adapters",
        "/chat": "prompt messages generate_kwargs return_full_text adapters model prefix handle_long_generation",
        "/tokenize": "prompt messages add_special_tokens",
        "/detokenize": "tokens",
    }
    bases = {CHAT: QUESTION, TEXT: PROMPT, "/chat": {"prompt": "x", "generate_kwargs": {"max_new_tokens": 2}},
             "/tokenize": {"prompt": "x"}, "/detokenize": {"tokens": [5]}}
    sent = 0
    for path, names in fields.items():
        for name in names.split():
            for value in values:
                status, top, text = post(path, {**bases[path], name: value})
                assert status in (200, 400, 404), (path, name, value, status, text[:300])
                if status != 200:
                    error = json.loads(text)["error"]
                    assert error["message"] and error["type"], (path, name, value, text)
                sent += 1
    for name in "max_length max_new_tokens min_length do_sample temperature top_k top_p num_beams eos_token_id typical_p".split():
        for value in values:
            status, _, text = post("/chat", {"prompt": "x", "generate_kwargs": {"max_new_tokens": 2, name: value}})
            assert status in (200, 400), (name, value, status, text[:300])
            sent += 1
    return sent


def bodies():
    for name, body in {
        "nothing": b"", "half": b'{"prompt": [5', "no object": b"[1]", "a text": b'"x"', "not UTF-8": b'{"prompt": "\xff\xfe"}',
        "lone surrogate": b'{"prompt": "\\ud800"}', "NaN": b'{"prompt": [5], "temperature": NaN}', "deep": b"[" * 200_000,
        "infinite": b'{"prompt": [5], "temperature": 1e999}', "twice": b'{"prompt": [5], "prompt": [6], "max_tokens": 1e99}',
    }.items():
        refused(name, TEXT, body, 400)
    refused("ten megabytes", TEXT, {"prompt": "word " * 2_000_000}, 400, 413)
    refused("beyond the vocabulary", TEXT, {"prompt": [4_000_000_000]}, 400)
    refused("negative", TEXT, {"prompt": [-5]}, 400)
    refused("huge n", TEXT, {**PROMPT, "n": 10**9}, 400)
    refused("unknown model", CHAT, {**QUESTION, "model": "nobody"}, 404)
    refused("unknown adapter", CHAT, {**QUESTION, "adapters": [{"name": "nobody"}]}, 404)
    refused("ten thousand stops", CHAT, {**QUESTION, "stop": ["x"] * 10_000}, 400)
    refused("empty stop", CHAT, {**QUESTION, "stop": ""}, 400)
    for name, value in {"guided_json": {}, "guided_regex": "a", "structured_outputs": {"json": {}}, "use_beam_search": True,
                        "allowed_token_ids": [5], "bad_words": ["a"], "length_penalty": 2, "no_repeat_ngram_size": 3, "grammar": "x",
                        "typical_p": 0.5, "functions": [{"name": "f"}], "audio": {}, "modalities": ["audio"],
                        "truncate_prompt_tokens": 1, "mirostat": 2, "prediction": {"content": "x"}}.items():
        status, _, text = post(CHAT, {**QUESTION, name: value})
        assert status == 400 and name in json.loads(text)["error"]["message"], (name, status, text[:200])


def protocol():
    ok = json.dumps(PROMPT).encode()
    assert send(head("POST", TEXT, len(ok), version="1.0") + ok).split()[1] == b"200", "HTTP/1.0"
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(ok[at:at + 5]), ok[at:at + 5]) for at in range(0, len(ok), 5)) + b"0\r\n\r\n"
    top = head("POST", TEXT, 0).replace(b"content-length: 0", b"transfer-encoding: chunked")
    assert send(top + chunks).split()[1] == b"200", "chunks"
    assert send(top + b"zz\r\n").split()[1:2] in ([b"400"], []), "a broken chunk"
    two = head("POST", TEXT, len(ok)).replace(b"connection: close\r\n", b"") + ok
    assert send(two + head("POST", TEXT, len(ok)) + ok).count(b"HTTP/1.1 200") == 2, "pipelining"
    for method, path, status in [("HEAD", "/health", b"200"), ("OPTIONS", CHAT, b"405"), ("PUT", CHAT, b"405"), ("GET", CHAT, b"405"),
                                 ("DELETE", "/", b"405"), ("GET", "/none", b"404"), ("GET", "//", b"404"), ("GET", "/v1/../health", b"404"),
                                 ("POST", "/health", b"405"), ("GET", "/%00", b"404"), ("GET", "/v1/models/none", b"404")]:
        found = send(head(method, path, 0))
        assert found.split()[1] == status, (method, path, found[:200])
        if method != "HEAD" and status != b"200":
            assert json.loads(found.partition(b"\r\n\r\n")[2])["error"]["message"], (method, path, found)
    assert send(b"GET /health HTTP/1.1\r\nx: " + b"y" * 300_000 + b"\r\n\r\n")[:12] in (b"HTTP/1.1 431", b""), "a huge header"
    assert send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")[:12] in (b"HTTP/1.1 400", b""), "TLS where there is none"
    assert send(b"hello\r\n\r\n")[:12] in (b"HTTP/1.1 400", b""), "no HTTP"
    for length in ["-1", "abc", "99999999999999999999"]:
        found = send(head("POST", TEXT, length) + ok, half=True)
        assert found[9:12] in (b"400", b"413", b""), (length, found[:100])
    for key in ["", "Bearer", "Bearer wrong", "bearer secret x", "Basic c2VjcmV0", "Bearer " + "s" * 40_000]:
        found = send(head("POST", TEXT, len(ok)).replace(b"authorization: Bearer secret", b"authorization: " + key.encode()) + ok)
        assert found.split()[1:2] in ([b"401"], [b"431"]) and b"secret" not in found, (key[:30], found[:200])


def streams():
    for options in [{"include_usage": True}, {"include_usage": False}, {}, None]:
        status, _, text = post(CHAT, {**QUESTION, "stream": True, "stream_options": options})
        assert status == 200 and b"[DONE]" in text and (b'"usage":{' in text) == bool((options or {}).get("include_usage")), text[-300:]


def disconnects():
    """A client leaves in the header, in the body, before the answer, and in the stream."""
    long = json.dumps({**QUESTION, "max_tokens": 200, "ignore_eos": True, "stream": True}).encode()
    whole = head("POST", CHAT, len(long)) + long
    for cut in [1, 30, len(whole) - len(long), len(whole) - 5, len(whole)]:
        for wait in (0, 1):
            for _ in range(5):
                stream = socket.create_connection((host, int(port)))
                stream.sendall(whole[:cut])
                if wait and cut == len(whole):
                    stream.recv(100)
                stream.close()
    slow = [socket.create_connection((host, int(port))) for _ in range(200)]
    for stream in slow:
        stream.sendall(whole[:20])
    begun = time.time()
    assert post(TEXT, PROMPT)[0] == 200 and time.time() - begun < 20, "clients that send nothing hold others up"
    for stream in slow:
        stream.close()


def lives():
    os.kill(pid, 0)
    assert post(TEXT, PROMPT)[0] == 200
    end = time.time() + 60
    while time.time() < end:
        metrics = send(head("GET", "/metrics", 0)).decode()
        busy = [line for line in metrics.splitlines() if line.startswith("vllm:num_requests_") and not line.endswith(" 0")]
        if not busy:
            return
        time.sleep(0.1)
    raise AssertionError(busy)


begun = time.time()
sent = every_field_of_every_type()
for part in (bodies, protocol, streams, disconnects):
    part()
    lives()
print(f"attack: {sent} wrong values and everything else in {time.time() - begun:.1f} s; the server lives")
