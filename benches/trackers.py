"""Times a run without trackers against runs whose trackers are dead, slow or wrong, in turn, and compares what they write.

  python3 benches/trackers.py HONE [--rounds 7] [--steps 150] [--keep DIR]

HONE is the binary. Each round runs every case once, in another order. Printed: median and spread of the seconds of training
(hone.json), CPU seconds of the process, the ratios of both to the run without trackers in the same round, the seconds of the
whole process, and whether adapter and metrics.jsonl have the same bytes. The end of a process waits at most 15 s for trackers; training never does.
"""
import argparse, hashlib, json, os, random, socket, socketserver, statistics, subprocess, tempfile, threading, time
from pathlib import Path


def serve(answer):
    """An address whose connections get what `answer` sends; None keeps them open and silent."""
    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            if answer is None:
                time.sleep(3600)
            self.request.recv(65536)
            self.request.sendall(answer)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads, allow_reuse_address = True, True

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}"


def dead():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("hone")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--keep")
    options = parser.parse_args()
    hone = str(Path(options.hone).resolve())
    work = Path(options.keep or tempfile.mkdtemp(prefix="trackers-"))
    subprocess.run([hone, "example", "try", "--write-only"], cwd=work, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wrong = b"HTTP/1.1 500 X\r\nconnection: close\r\ncontent-length: 3\r\n\r\nno!"
    cases = {"none": None, "tensorboard": "tensorboard", "dead": dead(), "slow": serve(None), "wrong": serve(wrong)}
    times, walls, cpus, digests = ({name: [] for name in cases} for _ in range(4))
    for round_ in range(options.rounds):
        names = list(cases)
        random.Random(round_).shuffle(names)
        for name in names:
            output = work / f"{name}-{round_}"
            command = [hone, "run", "try/hone.yaml", "--output", str(output), "--device", "cpu", "-q"]
            for setting in (f"max_steps={options.steps}", "logging_steps=1", "save_strategy=no"):
                command += ["--set", f"TrainingArguments.{setting}"]
            command += ["--set", "push=[]"]
            if name == "tensorboard":
                command += ["--set", "TrainingArguments.report_to=tensorboard"]
            elif cases[name]:
                url = cases[name]
                command += ["--set", "TrainingArguments.report_to=mlflow", "--set", f"mlflow={url}", "--set", f"pushgateway={url}", "--set", f"otlp={url}"]
            began, before = time.monotonic(), os.times()
            subprocess.run(command, cwd=work, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            walls[name].append(time.monotonic() - began)
            after = os.times()
            cpus[name].append(after.children_user + after.children_system - before.children_user - before.children_system)
            times[name].append(json.loads((output / "hone.json").read_text())["trained"]["seconds"])
            content = b"".join((output / file).read_bytes() for file in ("adapter_model.safetensors", "metrics.jsonl"))
            digests[name].append(hashlib.sha256(content).hexdigest())
    one = set(digest for list_ in digests.values() for digest in list_)
    print(f"{options.rounds} rounds of {options.steps} steps, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    for name in cases:
        ratios, cpu = ([own / bare for own, bare in zip(of[name], of["none"])] for of in (times, cpus))
        print(f"{name:12} training {statistics.median(times[name]):.3f} s ({min(times[name]):.3f} to {max(times[name]):.3f}), "
              f"{statistics.median(ratios):.4f} of none ({min(ratios):.4f} to {max(ratios):.4f}); CPU {statistics.median(cpus[name]):.3f} s, "
              f"{statistics.median(cpu):.4f} of none ({min(cpu):.4f} to {max(cpu):.4f}); process {statistics.median(walls[name]):.2f} s")
    print("the same bytes" if len(one) == 1 else f"DIFFERENT BYTES: {len(one)} kinds")


main()
