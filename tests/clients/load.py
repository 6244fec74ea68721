"""Many clients at once, some of which leave in the middle or read slowly: every answer is right, every place is free afterwards,
and the server's memory stays within its plan and does not grow.

Usage: python tests/clients/load.py ADDRESS PID PLANNED_BYTES [CLIENTS [ROUNDS]]
"""
import asyncio
import json
import random
import sys
import time

address, pid = sys.argv[1].removeprefix("http://"), int(sys.argv[2])
planned = int(sys.argv[3])
clients = int(sys.argv[4]) if len(sys.argv) > 4 else 100
rounds = int(sys.argv[5]) if len(sys.argv) > 5 else 4
host, port = address.split(":")
MIXES = [{"model": "tiny"}, {"model": "tuned"}, {"model": "half"}, {"adapters": [{"name": "tuned", "strength": 0.3}]}]
# Shares of the plan: memory that the process may take beyond it, and growth from the first round to the last.
SHARE = 0.03


def memory():
    """Bytes in memory now, and the most so far."""
    with open(f"/proc/{pid}/status") as status:
        lines = dict(line.split(":", 1) for line in status)
    return tuple(int(lines[name].split()[0]) << 10 for name in ("VmRSS", "VmHWM"))


async def request(method, path, body=None):
    reader, writer = await asyncio.open_connection(host, int(port))
    text = json.dumps(body) if body is not None else ""
    writer.write(f"{method} {path} HTTP/1.1\r\nhost: h\r\nauthorization: Bearer secret\r\nconnection: close\r\n"
                 f"content-length: {len(text)}\r\n\r\n{text}".encode())
    await writer.drain()
    return reader, writer


async def read(reader):
    head = await reader.readuntil(b"\r\n\r\n")
    body = await reader.read()
    if b"chunked" in head.lower():
        parts = b""
        while body:
            size, rest = body.split(b"\r\n", 1)
            parts, body = parts + rest[:int(size, 16)], rest[int(size, 16) + 2:]
        body = parts
    return int(head.split()[1]), body


async def ask(kind, stream, tokens):
    body = {**MIXES[kind], "messages": [{"role": "user", "content": f"What is {kind}?"}], "temperature": 0, "max_tokens": tokens,
            "stream": stream, "ignore_eos": True}
    return await request("POST", "/v1/chat/completions", body)


async def client(number, rng, counts, alone):
    kind, what = number % len(MIXES), rng.random()
    try:
        if what < 0.25:  # Leaves at some time, perhaps before the first byte.
            reader, writer = await ask(kind, rng.random() < 0.5, 200)
            try:
                await asyncio.wait_for(reader.read(100), rng.random())
            except asyncio.TimeoutError:
                pass
            writer.transport.abort()
            counts["left"] += 1
        elif what < 0.3:  # Reads a little, sleeps, and reads on.
            reader, writer = await ask(kind, True, 60)
            first = await reader.read(64)
            await asyncio.sleep(2)
            body = first + await reader.read()
            assert b"[DONE]" in body or b" 429 " in body.split(b"\r\n", 1)[0], body[-300:]
            writer.close()
            counts["slow"] += 1
        else:
            reader, writer = await ask(kind, False, 20)
            status, body = await read(reader)
            writer.close()
            assert status in (200, 429), (status, body[:300])
            if status == 200:
                found = json.loads(body)["choices"][0]["message"]["content"]
                assert found == alone[kind], (kind, found, alone[kind])
            counts[status] += 1
    except (ConnectionError, asyncio.IncompleteReadError) as error:
        raise AssertionError(f"client {number}: {error!r}") from error


async def idle():
    end = time.time() + 60
    while time.time() < end:
        reader, writer = await request("GET", "/metrics")
        _, body = await read(reader)
        writer.close()
        values = dict(line.rsplit(" ", 1) for line in body.decode().splitlines() if line and line[0] != "#")
        wanted = ["vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"]
        found = [float(next(value for name, value in values.items() if name.startswith(want))) for want in wanted]
        if found == [0, 0, 0]:
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"a place is not free: {dict(zip(wanted, found))}")


async def main():
    alone = []
    for kind in range(len(MIXES)):
        reader, writer = await ask(kind, False, 20)
        status, body = await read(reader)
        assert status == 200, body
        writer.close()
        alone.append(json.loads(body)["choices"][0]["message"]["content"])
    rng, sizes = random.Random(7), []
    counts = {"left": 0, "slow": 0, 200: 0, 429: 0}
    begun = time.time()
    for _ in range(rounds):
        await asyncio.gather(*(client(number, rng, counts, alone) for number in range(clients)))
        await idle()
        sizes.append(memory()[0])
    seconds = time.time() - begun
    assert counts[200] > 0 and counts["left"] > 0, counts
    told = f"{[size >> 20 for size in sizes]} MiB after the rounds, {memory()[1] >> 20} at most, {planned >> 20} planned"
    assert memory()[1] <= planned * (1 + SHARE), f"more memory than planned: {told}"
    # The first half of the rounds touches what the later ones use again; a leak grows in every round.
    assert sizes[-1] - sizes[len(sizes) // 2] <= planned * SHARE, f"memory grows: {told}"
    print(f"load: {rounds} x {clients} clients in {seconds:.1f} s: {counts[200]} answered, {counts[429]} told to come again, "
          f"{counts['left']} left, {counts['slow']} slow; {told}")


asyncio.run(main())
