"""Exported models compute in transformers what they compute here."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distgpt.checkpoint.reader import load_for_inference
from distgpt.cli import export_options
from distgpt.export import main
from distgpt.model.generate import generate
from tests.weights.shapes import CLASSES, SHAPES

transformers = pytest.importorskip("transformers")
CPU = torch.device("cpu")


def export(run: Path, output: Path, *options: str) -> Path:
    main(*export_options([str(run), str(output), *options]))
    return output


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_computes_the_same_logits_and_text(
    shape: str, run_of: Callable[[str], Path], tmp_path: Path
) -> None:
    run = run_of(shape)
    ours, _, _ = load_for_inference(run, CPU)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(export(run, tmp_path / "exported"))
    assert type(theirs).__name__ == CLASSES[shape.split()[0]]
    tokens_BT = torch.randint(0, ours.vocab_size, (3, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = ours(tokens_BT), theirs.eval()(tokens_BT).logits
    assert expected.std() > 0.05, "the logits say nothing"
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-5
    texts = []
    for prompt in tokens_BT[:, :4]:
        ids = generate(ours, prompt.tolist(), max_tokens=20, temperature=0.0, generator=torch.Generator())
        texts.append([*prompt.tolist(), *ids])
        assert theirs.generate(prompt[None], max_new_tokens=20, do_sample=False)[0].tolist() == texts[-1]
    assert len({token for text in texts for token in text[4:]}) > 3, texts
