"""What MLflow's client and TensorBoard's reader find of a finished run: the lines of its metrics.jsonl, its settings, its page.

python tests/clients/with_trackers.py FOLDER    # MLFLOW_TRACKING_URI names the server
"""
import json
import sys
import tempfile
from pathlib import Path

from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

folder = Path(sys.argv[1])
lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
steps = {line["step"]: line for line in lines if "loss" in line}
evaluations = {line["step"]: line for line in lines if "eval_loss" in line}
assert steps and evaluations

client = MlflowClient()
runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
assert len(runs) == 1, runs
run = runs[0]
assert run.info.status == "FINISHED" and run.info.run_name == "first", run.info
assert run.data.params["LoraConfig.r"] and run.data.params["TrainingArguments.learning_rate"], run.data.params
for name, found in [("loss", steps), ("grad_norm", steps), ("learning_rate", steps), ("eval_loss", evaluations)]:
    history = {point.step: point.value for point in client.get_metric_history(run.info.run_id, name)}
    assert history == {step: line[name] for step, line in found.items()}, name
with tempfile.TemporaryDirectory() as place:
    page = Path(client.download_artifacts(run.info.run_id, "report.html", place)).read_bytes()
assert page.startswith(b"<!doctype html>") or page.startswith(b"<!DOCTYPE html>"), page[:40]

events = EventAccumulator(str(next(folder.rglob("events.out.tfevents.*")).parent))
events.Reload()
for name, found in [("train/loss", steps), ("eval/loss", evaluations)]:
    key = "eval_loss" if name == "eval/loss" else "loss"
    points = {point.step: point.value for point in events.Scalars(name)}
    assert points.keys() == found.keys(), name
    assert all(abs(points[step] - line[key]) <= 1e-6 * abs(line[key]) for step, line in found.items()), name
print(f"mlflow and tensorboard have all {len(steps)} steps and {len(evaluations)} evaluations")
