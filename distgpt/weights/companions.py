"""The files beside exported weights: generation settings, tokenizer and model card."""

import json
import math
from pathlib import Path
from typing import Any

import distgpt
from distgpt.checkpoint.manifest import RunState
from distgpt.config import Config, data_name
from distgpt.corpus.tokenizer import Tokenizer
from distgpt.corpus.tokenizer.base import END_OF_TEXT
from distgpt.corpus.tokenizer.exported import to_hugging_face

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- distgpt
---

# {name}

A language model, trained with distgpt {version}.

| | |
|---|---|
{facts}

## Use

{use}

## Licence

None is stated here. Before you share this model, add `license:` to the head of this file, and say whose text it has
learned.
"""
USE_STANDARD = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("DIRECTORY")
tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")
ids = model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=100, do_sample=True)
print(tokenizer.decode(ids[0]))
```"""
USE_PLAIN = """\
No standard architecture computes this model. `model.safetensors` has its weights under the names of distgpt, and
`config.toml` its configuration. `python -m distgpt.train --init.from=DIRECTORY` starts a run from it."""


def json_file(content: dict[str, Any]) -> bytes:
    """Return the content of a file of JSON."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def standard_files(config: Config, state: RunState, tokenizer: Tokenizer) -> dict[str, bytes]:
    """Return the settings and the tokenizer that Hugging Face transformers reads, by file name."""
    ends = {"bos_token_id": state.eot_id, "eos_token_id": state.eot_id, "pad_token_id": state.eot_id}
    names = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT) if tokenizer.eot_id is not None else {}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.model.block_size,
        "clean_up_tokenization_spaces": False,
        **names,
    }
    return {
        "generation_config.json": json_file({key: value for key, value in ends.items() if value is not None}),
        "tokenizer.json": to_hugging_face(tokenizer).encode(),
        "tokenizer_config.json": json_file(settings),
    }


def model_card(
    checkpoint: Path, config: Config, state: RunState, *, parameters: int, architecture: str | None
) -> bytes:
    """Return README.md with the facts of the run. `architecture`: the standard one, None for a plain export."""
    model, sequences = config.model, config.train.global_batch
    loss = "not measured at this step"
    if state.val_loss is not None:
        loss = f"{state.val_loss:.4f} nats per token (perplexity {math.exp(min(state.val_loss, 700)):.2f})"
    tokens = state.step * sequences * model.block_size
    facts = {
        "parameters": f"{parameters:,}",
        "architecture": architecture or "distgpt's own",
        "shape": f"{model.n_layer} layers of width {model.n_embd}, {model.n_head} heads",
        "context": f"{model.block_size:,} tokens",
        "vocabulary": f"{state.vocab_size:,} tokens",
        "data": f"{data_name(config.data.path)}, fingerprint {state.data_fingerprint[:12]}",
        "started from": Path(config.init.from_).name or "random weights",
        "training": f"{state.step:,} steps of {sequences:,} sequences: {tokens:,} tokens seen",
        "validation loss": loss,
    }
    lines = [f"| {name} | {value} |" for name, value in facts.items()]
    run = checkpoint.parent.parent.name if checkpoint.parent.name == "checkpoints" else checkpoint.name
    use = USE_STANDARD if architecture else USE_PLAIN
    return CARD.format(name=run, version=distgpt.__version__, facts="\n".join(lines), use=use).encode()
