"""Drives transformers' EarlyStoppingCallback and Trainer._determine_best_metric with lists of values.

python tests/scripts/early_stopping.py > tests/fixtures/early_stopping.json
"""
import json
from types import SimpleNamespace

from transformers import EarlyStoppingCallback, Trainer, TrainerControl, TrainerState
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

CASES = [
    dict(values=[3, 2, 1, 1.5, 1.6, 1.7, 0.5], patience=2, threshold=0.0, greater=False),
    dict(values=[3, 2, 1, 1.5, 0.9, 1.7, 0.5], patience=2, threshold=0.0, greater=False),
    dict(values=[3, 2.95, 2.9, 2.85, 2.8], patience=3, threshold=0.1, greater=False),
    dict(values=[3, 2.95, 2.85, 2.7, 2.6], patience=3, threshold=0.1, greater=False),
    dict(values=[1, 1, 1, 1], patience=1, threshold=0.0, greater=False),
    dict(values=[0.1, 0.2, 0.15, 0.19, 0.3], patience=2, threshold=0.0, greater=True),
    dict(values=[0.1, 0.2, 0.25, 0.26, 0.27, 0.5], patience=2, threshold=0.04, greater=True),
    dict(values=[5, 4, 3, 2, 1], patience=1, threshold=0.0, greater=False),
    dict(values=[5, 6, 7, 4], patience=3, threshold=0.0, greater=False),
]


def run(case):
    args = SimpleNamespace(
        metric_for_best_model="loss", greater_is_better=case["greater"], load_best_model_at_end=True,
        eval_strategy=IntervalStrategy.STEPS, save_strategy=SaveStrategy.STEPS)
    state, control = TrainerState(), TrainerControl()
    callback = EarlyStoppingCallback(case["patience"], case["threshold"])
    trainer = SimpleNamespace(args=args, state=state)
    stopped = None
    for step, value in enumerate(case["values"], 1):
        state.global_step = step
        metrics = {"eval_loss": value}
        callback.on_evaluate(args, state, control, metrics)
        Trainer._determine_best_metric(trainer, metrics, None)
        if control.should_training_stop:
            stopped = step
            break
    return dict(case, stopped_at=stopped, best_step=state.best_global_step)


print("[\n" + ",\n".join(json.dumps(run(case)) for case in CASES) + "\n]")
