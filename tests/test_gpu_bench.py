"""bench/gpu.py works on a CPU with tiny models, so that it can be trusted to run on a GPU."""

import importlib.util
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tests import jobs

SCRIPT = jobs.PROJECT / "bench" / "gpu.py"
# What each prints at the end. The other parts start whole runs, as tests/end_to_end does.
LAST_LINES = {
    "environment": "for Triton: ",
    "agreement": "bfloat16, dropout 0.1, fsdp on cpu: ",
    "documents": "losses differ by 0.0e+00, ",
    "throughput": "| gpt2-124m | 2 | False | ",
    "peer": "| like nanoGPT's | 4 | ",
    "loss": "| eager, chunks of 2,048 | ",
    "decode": "",
}


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_bench", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_bench"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would use the GPU")
@pytest.mark.parametrize("part", LAST_LINES)
def test_a_part_runs_with_tiny_models(gpu: ModuleType, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.PARTS[part][0](gpu.Bench(smoke=True))
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].startswith(LAST_LINES[part])


@pytest.mark.skipif(torch.cuda.is_available(), reason="wants parts that fail for lack of a GPU")
def test_a_part_that_fails_does_not_end_the_others(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended: list[jobs.Ended] = []

    def start(command: list[str], *, start_new_session: bool) -> SimpleNamespace:
        ended.append(jobs.run(command))
        return SimpleNamespace(wait=lambda limit: ended[-1].code)

    monkeypatch.setattr(gpu, "subprocess", SimpleNamespace(Popen=start, TimeoutExpired=subprocess.TimeoutExpired))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "loss", "decode"])
    assert gpu.main() == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2:] == ["| loss | FAILED with 1 |", "| decode | FAILED with 1 |"]
    why = "no GPU: --smoke runs everything with tiny models on a CPU"
    assert [part.stderr.count(why) for part in ended] == [1, 1]
