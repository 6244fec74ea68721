"""lm-evaluation-harness' local-completions: a tiny multiple-choice task and a perplexity, with the server's own tokenizer, and the
same scores asked for by hand."""
import json
import logging
import math
import sys
import urllib.request
from pathlib import Path

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager

logging.disable(logging.WARNING)
address, work = sys.argv[1], Path(sys.argv[2])
rows = [
    {"question": f"{a} and {b} make", "choices": [str(a + b), str(a * b + 7)], "answer": 0}
    for a, b in [(1, 2), (3, 4), (2, 5), (6, 1)]
]
data = work / "rows.jsonl"
data.write_text("".join(json.dumps(row) + "\n" for row in rows))
tasks = work / "tasks"
tasks.mkdir()
head = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
choice = {**head, "task": "tiny_choice", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
          "doc_to_choice": "{{choices}}", "doc_to_target": "answer", "metric_list": [{"metric": "acc"}]}
rolling = {**head, "task": "tiny_text", "output_type": "loglikelihood_rolling", "doc_to_text": "",
           "doc_to_target": "{{question}}", "metric_list": [{"metric": "word_perplexity"}]}
for task in (choice, rolling):
    (tasks / f"{task['task']}.yaml").write_text(json.dumps(task))


def model(name, **more):
    return LocalCompletionsAPI(base_url=f"{address}/v1/completions", model=name, auth_token="secret", max_length=256,
                               header={"Authorization": "Bearer secret"}, **more)


def by_hand(name, context, continuation):
    body = {"model": name, "prompt": context + continuation, "max_tokens": 0, "echo": True, "logprobs": 0}
    request = urllib.request.Request(f"{address}/v1/completions", json.dumps(body).encode(),
                                     {"Authorization": "Bearer secret", "Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        scores = json.load(answer)["choices"][0]["logprobs"]["token_logprobs"]
    return sum(scores[len(context):])


found = {}
for name in ("tiny", "tuned"):
    asked = model(name, batch_size=2, num_concurrent=2)
    assert asked.tokenizer_backend == "remote", "the harness did not find the server's tokenizer"
    pairs = [(row["question"], " " + row["choices"][0]) for row in rows]
    instances = [Instance("loglikelihood", {}, pair, at) for at, pair in enumerate(pairs)]
    for (context, continuation), (score, greedy) in zip(pairs, asked.loglikelihood(instances)):
        whole = asked.tok_encode(context + continuation)
        ids = asked.tok_encode(context)
        assert whole[:len(ids)] == ids, "the tokens of the context are the first of the whole text"
        expected = by_hand(name, ids, whole[len(ids):])
        assert math.isfinite(score) and score < 0 and isinstance(greedy, bool)
        assert abs(score - expected) < 1e-3, (score, expected)
    results = lm_eval.simple_evaluate(model=asked, tasks=["tiny_choice", "tiny_text"], bootstrap_iters=0,
                                      task_manager=TaskManager(include_path=str(tasks), include_defaults=False))
    accuracy = results["results"]["tiny_choice"]["acc,none"]
    perplexity = results["results"]["tiny_text"]["word_perplexity,none"]
    assert 0 <= accuracy <= 1 and math.isfinite(perplexity) and perplexity > 1
    found[name] = (accuracy, perplexity)
assert found["tiny"][1] != found["tuned"][1], found

# Text that is generated, and its stop strings.
until = Instance("generate_until", {}, ("one two", {"until": ["\n\n"], "max_gen_toks": 8, "temperature": 0}), 0)
assert isinstance(model("tuned").generate_until([until])[0], str)
print("lm-evaluation-harness:", {name: f"accuracy {a:.2f}, word perplexity {p:.1f}" for name, (a, p) in found.items()})
