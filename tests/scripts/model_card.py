"""huggingface_hub's own reader and the hub's validator for a model card.

python tests/scripts/model_card.py tests/fixtures/model_card.md [--online]   # --online asks the hub's validator too
"""
import sys

from huggingface_hub import ModelCard

card = ModelCard.load(sys.argv[1], ignore_metadata_errors=False)
data = card.data
assert data.library_name == "peft" and data.pipeline_tag == "text-generation" and data.base_model, data
for result in data.eval_results or []:
    print(result.task_type, result.dataset_name, result.metric_type, result.metric_value)
if "--online" in sys.argv:
    card.validate()
print("accepted:", data.base_model, data.datasets, data.tags)
