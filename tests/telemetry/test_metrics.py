"""metrics.jsonl and TensorBoard: each step is logged once, also after a kill, and a full disk does not end a run."""

import json
import math
import mmap
import re
import resource
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import metadata as layout_metadata
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams import metadata as hparams
from tensorboard.plugins.hparams.api_pb2 import STATUS_SUCCESS

from distgpt.config import resolve
from distgpt.errors import StorageError
from distgpt.run.lock import RunLock
from distgpt.run.paths import RunPaths
from distgpt.telemetry.dashboard import FINAL_TAGS, GOODPUT, MFU, TRAIN_LOSS, VALIDATION_LOSS
from distgpt.telemetry.metrics import Metrics, StepFigures, memory_bytes, perplexity
from distgpt.telemetry.step_lines import read_lines
from tests import jobs


def owned() -> None:
    """Pass: no other job owns this run directory."""


def log_step(
    metrics: Metrics, step: int, *, loss: float = 2.0, mfu: float | None = None, skipped: bool = False
) -> None:
    metrics.train(
        StepFigures(
            step=step,
            loss=loss,
            lr=3e-4,
            grad_norm=0.5,
            loss_z=None,
            grad_norm_z=-0.5,
            skipped=skipped,
            tokens=step * 100,
            tokens_per_second=1000.0,
            mfu=mfu,
            seconds=0.1,
            memory_bytes=2**30,
            data_wait=0.0,
            checkpoint_stall=0.25,
        )
    )


def lines(run_dir: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def tensorboard(run_dir: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(run_dir / "tb"), purge_orphaned_data=True)
    accumulator.Reload()
    return accumulator


@contextmanager
def full_disk(path: Path, *, free: int) -> Iterator[None]:
    """Limit all files to the size of `path` plus `free` bytes: the next write is cut short, the one after it fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_lines_have_the_documented_fields(tmp_path: Path) -> None:
    with closing(Metrics(tmp_path, resume_step=0, require_owned=owned)) as metrics:
        log_step(metrics, 1, mfu=0.4)
        assert len(lines(tmp_path)) == 1, "a line must be in the file at once"
        metrics.evaluation(1, val_loss=1.5, val_bits_per_byte=2.2)
    training, evaluation = lines(tmp_path)
    documented = {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "mfu", "seconds"}
    assert documented <= training.keys()
    assert training["mfu"] == 0.4
    assert evaluation == {"step": 1, "val_loss": 1.5, "val_perplexity": math.exp(1.5), "val_bits_per_byte": 2.2}
    assert metrics.dropped == 0


def test_values_that_are_not_finite_are_null(tmp_path: Path) -> None:
    with closing(Metrics(tmp_path, resume_step=0, require_owned=owned)) as metrics:
        log_step(metrics, 1, loss=math.nan, skipped=True)
        metrics.evaluation(1, val_loss=5000.0, val_bits_per_byte=math.inf)
    training, evaluation = lines(tmp_path)
    assert training["loss"] is None
    assert training["skipped"] is True
    assert training["mfu"] is None
    assert evaluation["val_perplexity"] is None
    assert evaluation["val_bits_per_byte"] is None


def test_no_step_is_logged_twice_after_a_kill(tmp_path: Path) -> None:
    # After a kill the files are not closed and the last line is incomplete.
    killed = Metrics(tmp_path, resume_step=0, require_owned=owned)
    for step in range(1, 9):
        log_step(killed, step, loss=9.0)
    killed.evaluation(8, val_loss=9.0, val_bits_per_byte=2.0)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "loss": 1.')
    with closing(Metrics(tmp_path, resume_step=5, require_owned=owned)) as metrics:
        for step in range(6, 11):
            log_step(metrics, step, loss=1.0)
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 11))
    assert [line["loss"] for line in lines(tmp_path)] == [9.0] * 5 + [1.0] * 5
    points = tensorboard(tmp_path).Scalars(TRAIN_LOSS)
    assert [(p.step, p.value) for p in points] == [(s, 9.0 if s < 6 else 1.0) for s in range(1, 11)]


@pytest.mark.parametrize("incomplete", [b'{"step": 6', b'{"step": 6}', b"\0\0\0\0\n", b"[6]\n"])
def test_an_incomplete_last_line_is_removed(tmp_path: Path, incomplete: bytes) -> None:
    good = b'{"step": 4}\n{"step": 5}\n'
    (tmp_path / "metrics.jsonl").write_bytes(good + incomplete)
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [4, 5]
    Metrics(tmp_path, resume_step=6, require_owned=owned).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == good


def test_a_damaged_line_does_not_hide_other_lines(tmp_path: Path) -> None:
    before, damaged, after = b'{"step": 4}\n', b'{"step": 5\xfd\n', b'{"step": 6}\n'
    (tmp_path / "metrics.jsonl").write_bytes(before + damaged + after + b'{"step": 7}\n')
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [4, 6, 7]
    Metrics(tmp_path, resume_step=6, require_owned=owned).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before + damaged + after


def test_tensorboard_shows_a_run_resumed_after_the_clock_was_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.time_ns", lambda: 2_000_000_000 * 10**9)
    log_step(Metrics(tmp_path, resume_step=0, require_owned=owned), 1)
    monkeypatch.setattr("time.time_ns", lambda: 1_900_000_000 * 10**9)
    log_step(Metrics(tmp_path, resume_step=1, require_owned=owned), 2)
    assert [point.step for point in tensorboard(tmp_path).Scalars(TRAIN_LOSS)] == [1, 2]


def test_a_run_killed_before_its_first_checkpoint_restarts_with_an_empty_file(tmp_path: Path) -> None:
    for _ in range(2):
        metrics = Metrics(tmp_path, resume_step=0, require_owned=owned)
        metrics.evaluation(0, val_loss=4.0, val_bits_per_byte=2.0)
        log_step(metrics, 1)
    assert [line["step"] for line in lines(tmp_path)] == [0, 1]
    assert len(tensorboard(tmp_path).Scalars(VALIDATION_LOSS)) == 1


def test_tensorboard_has_curves_and_verbatim_text(tmp_path: Path) -> None:
    with closing(Metrics(tmp_path, resume_step=0, require_owned=owned)) as metrics:
        log_step(metrics, 3, mfu=0.25, skipped=True)
        metrics.evaluation(3, val_loss=1.5, val_bits_per_byte=2.0, val_losses={"books": 1.75})
        metrics.text("sample", "# no heading\n```\n*no* emphasis \udcff", 3)
    events = tensorboard(tmp_path)
    tags = events.Tags()
    assert {TRAIN_LOSS, VALIDATION_LOSS, "loss/validation_perplexity", "loss/validation_bits_per_byte"} <= set(
        tags["scalars"]
    )
    assert {"optim/learning_rate", "speed/memory_gib", "speed/checkpoint_stall_s"} <= set(tags["scalars"])
    assert events.Scalars(MFU)[0].value == 25.0
    assert events.Scalars(f"{VALIDATION_LOSS}/books")[0].value == 1.75
    assert events.Scalars("speed/memory_gib")[0].value == 1.0
    assert events.Scalars("optim/grad_norm_z")[0].value == -0.5
    assert events.Scalars("optim/skipped")[0].value == 1.0
    assert "optim/loss_z" not in tags["scalars"], "it has no value yet"
    assert tags["tensors"] == ["sample/text_summary"]
    text = events.Tensors("sample/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text == "````\n# no heading\n```\n*no* emphasis ?\n````"


def test_tensorboard_arranges_the_charts_and_compares_configs(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    with closing(Metrics(mine, resume_step=0, require_owned=owned)) as metrics:
        metrics.config(resolve(["--optim.lr=0.5", "--model.mlp=relu2"], {}), 0)
        log_step(metrics, 1, mfu=0.25)
        metrics.evaluation(1, val_loss=1.5, val_bits_per_byte=2.0)
        metrics.done(1)
    events = tensorboard(mine)
    scalars = {*events.Tags()["scalars"], GOODPUT}  # which Progress logs
    [record] = events.Tensors(layout_metadata.CONFIG_SUMMARY_TAG)
    layout = Layout.FromString(record.tensor_proto.string_val[0])
    charts = [chart for category in layout.category for chart in category.chart]
    shown = [[tag for tag in sorted(scalars) if any(re.match(p, tag) for p in c.multiline.tag)] for c in charts]
    assert shown[0] == [TRAIN_LOSS, VALIDATION_LOSS]
    assert shown[-1] == [GOODPUT]
    assert all(len(tags) == len(chart.multiline.tag) for tags, chart in zip(shown, charts, strict=True))
    assert set(FINAL_TAGS) <= scalars
    assert sorted(scalars)[0].startswith("loss/")
    assert sorted(scalars)[-1] == GOODPUT

    def plugin_data(tag: str) -> bytes:
        content: bytes = events.SummaryMetadata(tag).plugin_data.content
        return content

    start = hparams.parse_session_start_info_plugin_data(plugin_data(hparams.SESSION_START_INFO_TAG))
    assert start.group_name == "mine"
    assert start.hparams["optim.lr"].number_value == 0.5
    assert start.hparams["model.mlp"].string_value == "relu2"
    assert start.hparams["model.bias"].bool_value is True
    experiment = hparams.parse_experiment_plugin_data(plugin_data(hparams.EXPERIMENT_TAG))
    assert [info.name.tag for info in experiment.metric_infos] == list(FINAL_TAGS)
    assert {info.name for info in experiment.hparam_infos} == set(start.hparams)
    end = hparams.parse_session_end_info_plugin_data(plugin_data(hparams.SESSION_END_INFO_TAG))
    assert end.status == STATUS_SUCCESS


def test_samples_are_kept_whole_and_each_step_once(tmp_path: Path) -> None:
    def samples() -> list[dict[str, Any]]:
        return [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]

    with closing(Metrics(tmp_path, resume_step=0, require_owned=owned)) as metrics:
        assert not (tmp_path / "samples.jsonl").exists()
        for step in (10, 20, 30):
            metrics.sample(step, f"step {step}\n\udcff")
    assert samples() == [{"step": step, "text": f"step {step}\n\udcff"} for step in (10, 20, 30)]
    with closing(Metrics(tmp_path, resume_step=20, require_owned=owned)) as metrics:
        metrics.sample(30, "again")
    assert [(line["step"], line["text"][:5]) for line in samples()] == [(10, "step "), (20, "step "), (30, "again")]


def test_a_full_disk_loses_figures_but_does_not_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(Metrics(tmp_path, resume_step=0, require_owned=owned)) as metrics:
        log_step(metrics, 1)
        [events] = (tmp_path / "tb").iterdir()
        with full_disk(tmp_path / "metrics.jsonl", free=30):
            log_step(metrics, 2)
            metrics.text("sample", "x" * 10_000, 2)
            log_step(metrics, 3)
        lost = metrics.dropped
        assert lost >= 3
        log_step(metrics, 4)
        assert metrics.dropped == lost
    assert [line["step"] for line in lines(tmp_path)] == [1, 4], "half a line must not remain"
    steps = [point.step for point in tensorboard(tmp_path).Scalars(TRAIN_LOSS)]
    assert steps[0] == 1
    assert steps[-1] == 4, "half a record would hide all later ones"
    assert events.stat().st_size > 0
    assert capsys.readouterr().err.count("metrics are being lost") == 1


def test_tensorboard_recovers_when_its_directory_can_be_created(tmp_path: Path) -> None:
    (tmp_path / "tb").write_text("a file")
    with closing(Metrics(tmp_path, resume_step=0, require_owned=owned)) as metrics:
        log_step(metrics, 1)
        assert metrics.dropped == 1
        (tmp_path / "tb").unlink()
        log_step(metrics, 2)
        assert metrics.dropped == 1
    assert [point.step for point in tensorboard(tmp_path).Scalars(TRAIN_LOSS)] == [2]


def test_a_run_directory_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot write .*metrics\.jsonl"):
        Metrics(tmp_path / "missing", resume_step=0, require_owned=owned)
    with pytest.raises(StorageError, match="cannot read"):
        read_lines(tmp_path / "missing")


def test_memory_grows_with_an_allocation() -> None:
    before = memory_bytes(torch.device("cpu"))
    # mmap, because malloc may reuse memory that an earlier test has freed.
    with mmap.mmap(-1, 64 * 2**20) as held:
        held.write(bytes(range(256)) * (64 * 2**12))
        assert memory_bytes(torch.device("cpu")) - before > 48 * 2**20


def test_perplexity() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(1e6) == math.inf
    assert math.isnan(perplexity(math.nan))


@pytest.mark.parametrize("takeover_at", [1, 2, 3])
@pytest.mark.parametrize("logged", [0, 1])
def test_a_suspended_owner_writes_nothing_after_a_takeover(tmp_path: Path, logged: int, takeover_at: int) -> None:
    """The owner is suspended right after this check that the run directory is still its own."""
    after_takeover: list[dict[str, bytes]] = []
    checks = 0

    class Lost(Exception):
        pass

    def require_owned() -> None:
        nonlocal checks
        checks += counting
        if checks == takeover_at:
            RunLock(RunPaths(tmp_path)).release()
            with closing(Metrics(tmp_path, resume_step=logged, require_owned=owned)) as later:
                log_step(later, logged + 1)
            after_takeover.append(contents(tmp_path))
        elif checks > takeover_at:
            raise Lost

    counting = False
    with closing(Metrics(tmp_path, resume_step=0, require_owned=require_owned)) as earlier:
        for step in range(1, logged + 1):
            log_step(earlier, step)
        counting = True
        with suppress(Lost):
            for step in range(logged + 1, logged + 5):
                earlier.scalars(step, {TRAIN_LOSS: 9.0})
    assert checks > takeover_at
    assert after_takeover == [contents(tmp_path)]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def test_writes_of_an_earlier_owner_do_not_reach_the_new_files(tmp_path: Path) -> None:
    earlier = Metrics(tmp_path, resume_step=0, require_owned=owned)
    log_step(earlier, 1)
    log_step(earlier, 2)
    with closing(Metrics(tmp_path, resume_step=1, require_owned=owned)) as metrics:
        log_step(earlier, 3)
        log_step(metrics, 2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    assert not list(tmp_path.glob(".*"))


def test_a_process_that_lost_the_run_directory_writes_nothing(tmp_path: Path) -> None:
    class Lost(Exception):
        pass

    def lost() -> None:
        raise Lost

    with pytest.raises(Lost):
        Metrics(tmp_path, resume_step=0, require_owned=lost)
    assert list(tmp_path.iterdir()) == []


def test_a_resume_on_a_full_disk_truncates_the_file_in_place(tmp_path: Path) -> None:
    with jobs.disk(tmp_path / "disk", "size=1m") as disk:
        (disk / "metrics.jsonl").write_bytes(b'{"step": 4}\n' * 1000 + b'{"step": 5}\n')
        jobs.fill(disk / "filler")
        Metrics(disk, resume_step=4, require_owned=owned).close()
        assert (disk / "metrics.jsonl").read_bytes() == b'{"step": 4}\n' * 1000
        assert sorted(file.name for file in disk.iterdir()) == ["filler", "metrics.jsonl"]
