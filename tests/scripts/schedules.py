"""Records transformers' learning-rate schedules: the factor of every step.

python tests/scripts/schedules.py > tests/fixtures/schedules.json
"""
import json

import torch
import transformers
from transformers import get_scheduler

LR = 2e-4
CASES = [
    ("linear", 10, 3, {}),
    ("cosine", 10, 3, {}),
    ("cosine", 12, 0, {"num_cycles": 1.5}),
    ("constant", 10, 3, {}),
    ("constant_with_warmup", 10, 3, {}),
    ("cosine_with_restarts", 14, 2, {}),
    ("cosine_with_restarts", 20, 3, {"num_cycles": 3}),
    ("polynomial", 10, 3, {}),
    ("polynomial", 12, 0, {"lr_end": 5e-5, "power": 2.0}),
    ("inverse_sqrt", 12, 0, {}),
    ("inverse_sqrt", 12, 4, {}),
    ("inverse_sqrt", 12, 3, {"timescale": 7}),
    ("cosine_with_min_lr", 12, 2, {"min_lr": 2e-5}),
    ("cosine_with_min_lr", 12, 2, {"min_lr_rate": 0.25, "num_cycles": 1.0}),
    ("cosine_warmup_with_min_lr", 12, 4, {"min_lr_rate": 0.1}),
    ("cosine_warmup_with_min_lr", 12, 4, {"min_lr": 1e-5, "warmup_lr_rate": 0.2}),
    ("warmup_stable_decay", 14, 3, {"num_decay_steps": 5}),
    ("warmup_stable_decay", 16, 4, {"num_decay_steps": 6, "num_stable_steps": 3, "min_lr_ratio": 0.1, "warmup_type": "cosine", "decay_type": "linear"}),
    ("warmup_stable_decay", 16, 4, {"num_decay_steps": 8, "min_lr_ratio": 0.05, "warmup_type": "1-sqrt", "decay_type": "1-sqrt"}),
]


def factors(name, total, warmup, kwargs):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=LR)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total, scheduler_specific_kwargs=kwargs)
    found = []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"] / LR)
        optimizer.step()
        scheduler.step()
    return found


lines = [
    json.dumps(dict(name=name, total=total, warmup=warmup, kwargs=kwargs, learning_rate=LR, factors=factors(name, total, warmup, kwargs)))
    for name, total, warmup, kwargs in CASES
]
print('{"transformers": "%s", "cases": [\n%s\n]}' % (transformers.__version__, ",\n".join(lines)))
