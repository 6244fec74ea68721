"""A server that is killed and started again under load: a request in flight gets its whole right answer or an error, never a part
that looks whole; nothing else is lost. A signal to end lets all answers in flight be finished.

Usage: python tests/clients/restart.py HONE GOLDEN_MODEL WORK [CLIENTS]
"""
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time

hone, golden, work = sys.argv[1:4]
clients = int(sys.argv[4]) if len(sys.argv) > 4 else 24
# Answers that each client wants, and the tokens of one: an answer takes a few times as long as a restart's smallest
# step.
WANTED, TOKENS = 8, 40
# How the servers end, one after the other: at once, by a signal with time to finish, at once.
ENDS = [signal.SIGKILL, signal.SIGTERM, signal.SIGKILL]

with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]


class Broken(Exception):
    """A request that was sent and not answered in full."""


def start():
    log = open(os.path.join(work, "restart.log"), "ab")
    command = [hone, "--log", "json", "serve", f"{golden}/model", "--name", "tiny", "--adapter", f"tuned={golden}/final_adapter",
               "--listen", f"127.0.0.1:{port}", "--device", "cpu", "--cache", os.path.join(work, "cache"), "--waiting", "1000",
               "--set", "QuantizationConfig.load_in_4bit=false"]
    return subprocess.Popen(command, stderr=log, stdout=log)


async def ask(name, stream):
    """The text of an answer; `None`: no server took the request."""
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "What is it?"}], "temperature": 0,
                       "max_tokens": TOKENS, "ignore_eos": True, "stream": stream})
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionError:
        return None
    try:
        writer.write(f"POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
                     f"{body}".encode())
        await writer.drain()
        head = await reader.readuntil(b"\r\n\r\n")
        status = int(head.split()[1])
        if status == 503:  # It loads, or it ends.
            return None
        if status != 200:
            raise AssertionError(f"{status}: {await reader.read()}")
        if b"chunked" not in head.lower():
            length = int(head.lower().split(b"content-length:")[1].split()[0])
            return json.loads(await reader.readexactly(length))["choices"][0]["message"]["content"]
        return streamed(await chunks(reader))
    except (ConnectionError, asyncio.IncompleteReadError) as error:
        raise Broken from error
    finally:
        writer.transport.abort()


async def chunks(reader):
    """A chunked body, whose last chunk says that it is whole."""
    body = b""
    while size := int((await reader.readuntil(b"\r\n")).strip(), 16):
        body += (await reader.readexactly(size + 2))[:-2]
    return body


def streamed(body):
    events = [line[6:] for line in body.decode().splitlines() if line.startswith("data: ")]
    if any('"error"' in event for event in events):
        raise Broken
    assert events[-1] == "[DONE]", f"a stream that looks whole has no end: {events[-2:]}"
    return "".join(json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events[:-1])


async def until_ready(server):
    for _ in range(6000):
        assert server.poll() is None, "the server ended"
        if (text := await ask("tiny", False)) is not None:
            return text
        await asyncio.sleep(0.01)
    raise AssertionError("the server does not start")


class Load:
    def __init__(self, alone):
        self.alone, self.answered, self.turned_away = alone, 0, 0
        # When requests that were not answered in full were sent, and when that was seen.
        self.broken = []

    async def client(self, number):
        name, stream, wanted = ["tiny", "tuned"][number % 2], number % 3 == 0, WANTED
        while wanted > 0:
            sent = time.monotonic()
            try:
                text = await ask(name, stream)
            except Broken:
                self.broken.append((sent, time.monotonic()))
                continue
            if text is None:
                self.turned_away += 1
                await asyncio.sleep(0.02)
                continue
            assert text == self.alone[name], (name, text, self.alone[name])
            self.answered, wanted = self.answered + 1, wanted - 1


async def main():
    server = start()
    alone = {"tiny": await until_ready(server), "tuned": await ask("tuned", False)}
    assert alone["tiny"] != alone["tuned"], "the adapter changes nothing"
    load, ends = Load(alone), []
    running = asyncio.gather(*(load.client(number) for number in range(clients)))
    for at, how in enumerate(ENDS, 1):
        # In the middle: some answers are given, others are being given.
        while load.answered < clients * WANTED * at // (len(ENDS) + 1):
            assert not running.done() or running.result() is None
            await asyncio.sleep(0.002)
        before, killed = len(load.broken), time.monotonic()
        server.send_signal(how)
        while server.poll() is None:
            await asyncio.sleep(0.002)
        gone = time.monotonic()
        await asyncio.sleep(0.05)
        lost = load.broken[before:]
        if how == signal.SIGTERM:
            # Clients that sent their request before the signal get an answer, and so do clients that waited in the
            # kernel's queue until the server was gone.
            cut = [one for one in lost if one[0] < killed]
            assert (cut, server.returncode) == ([], 0), f"{cut} were cut by a signal to end, {server.returncode}"
        else:
            assert lost, "nothing was in flight"
        ends.append((killed, gone))
        server = start()
    await running
    assert load.answered == clients * WANTED
    for sent, seen in load.broken:
        assert any(sent <= gone and seen >= killed for killed, gone in ends), "a request was lost that no kill had cut"
    server.terminate()
    while server.poll() is None:
        await asyncio.sleep(0.002)
    assert server.returncode == 0, server.returncode
    print(f"restarts: {load.answered} right answers for {clients} clients through {len(ENDS)} restarts; {len(load.broken)} requests got "
          f"an error, {load.turned_away} were told to come again")


asyncio.run(main())
