#!/usr/bin/env bash
# lm_eval 0.4.13: set_fewshot_seed fixes a task's few-shot examples for one pass only. Its sampler has one random state,
# and each lm_eval.evaluate() over the same task objects draws on: the second model (the tuned Gemma behind its base,
# say) is asked with other examples than the first, and their difference is not paired. Nothing is said.
# simple_evaluate() seeds anew, evaluate() does not, and without set_fewshot_seed each process draws others.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --quiet --disable-pip-version-check install lm_eval==0.4.13 datasets==5.2.0
export HF_HUB_OFFLINE=1 HF_DATASETS_CACHE="$folder/cache" TQDM_DISABLE=1
"$folder/venv/bin/python" - "$folder" 2> "$folder/stderr" <<'PYTHON' || { cat "$folder/stderr"; exit 1; }
import json
import sys

from lm_eval import evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import get_task_dict

rows = f"{sys.argv[1]}/rows.jsonl"
with open(rows, "w") as file:
    file.writelines(json.dumps({"q": f"{number} + 1 =", "a": str(number + 1)}) + "\n" for number in range(24))
plus_one = {
    "task": "plus_one", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": rows}}, "test_split": "test",
    "fewshot_split": "test", "output_type": "loglikelihood", "doc_to_text": "{{q}}", "doc_to_target": "{{a}}",
    "num_fewshot": 2, "metric_list": [{"metric": "acc"}],
}  # fmt: skip


class Asked(LM):
    """Keeps what it was asked."""

    def loglikelihood(self, requests, disable_tqdm=False):
        self.prompts = [request.args[0] for request in requests]
        return [(-1.0, False) for _ in requests]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise NotImplementedError

    def generate_until(self, requests, disable_tqdm=False):
        raise NotImplementedError


def prompts(tasks):
    """The prompts of one pass."""
    model = Asked()
    evaluate(lm=model, task_dict=tasks, bootstrap_iters=0)
    return model.prompts


def same(left, right):
    """How many prompts two passes have in common."""
    return sum(one == other for one, other in zip(left, right, strict=True))


tasks = get_task_dict([plus_one])
(task,) = tasks.values()
task.set_fewshot_seed(1234)
first, second = prompts(tasks), prompts(tasks)
task.set_fewshot_seed(1234)
again = prompts(tasks)
print(f"of {len(first)} prompts the second pass has {same(first, second)}, seeded anew {same(first, again)}")
assert same(first, again) == len(first) == 24
assert same(first, second) < 6, "the behaviour changed: two passes draw the same examples"
PYTHON
# seen: of 24 prompts the second pass has 0, seeded anew 24
