"""An exported model runs in EleutherAI's lm-evaluation-harness, where that is installed."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distgpt.checkpoint.reader import load_for_inference
from tests import jobs
from tests.weights.test_export import export

TASK = """\
task: tiny
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {file}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{ctx}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "{{{{endings}}}}"
metric_list:
  - metric: acc
"""
CONTEXTS = ["once upon", "a time", "there was", "a small", "model", "of text"]
ENDINGS = ["abc", "zu", "and so"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
def test_its_accuracy_is_that_of_our_likelihoods(run_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Four of six labels are the endings that our model finds likeliest.

    Its text is one document. So it has no end-of-text token to begin with, and lm_eval must be told one.
    """
    model, tokenizer, _ = load_for_inference(run_of("qwen3"), torch.device("cpu"))

    def likelihood(context: str, ending: str) -> float:
        ids = torch.from_numpy(tokenizer.encode(f"{context} {ending}").astype("int64"))
        with torch.no_grad():
            log_p = model(ids[None, :-1])[0].log_softmax(-1)
        return float(log_p.gather(1, ids[1:, None])[len(context) - 1 :].sum())

    best = [max(range(3), key=lambda i: likelihood(context, ENDINGS[i])) for context in CONTEXTS]
    labels = [*best[:4], *((choice + 1) % 3 for choice in best[4:])]
    lines = [
        json.dumps({"ctx": context, "endings": ENDINGS, "label": label})
        for context, label in zip(CONTEXTS, labels, strict=True)
    ]
    (tmp_path / "tiny.jsonl").write_text("\n".join(lines))
    (tmp_path / "tiny.yaml").write_text(TASK.format(file=tmp_path / "tiny.jsonl"))
    exported = export(run_of("qwen3"), tmp_path / "exported")
    command = [
        *(sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={exported},prefix_token_id=0"),
        *(
            "--tasks",
            "tiny",
            "--include_path",
            str(tmp_path),
            "--device",
            "cpu",
            "--output_path",
            str(tmp_path / "out"),
        ),
    ]
    environment = {**jobs.environment(), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (results,) = tmp_path.rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["tiny"]["acc,none"] == pytest.approx(4 / 6)
