"""Skipped updates: z-scores as numpy computes them, and a filter that continues exactly from a saved state."""

import json
import math
import random

import numpy as np
import pytest

from distgpt.config import HealthConfig
from distgpt.health.outliers import MAX_SKIPS, MIN_VALUES, WINDOW, Decision, OutlierFilter, z_score

SKIP = HealthConfig(on_nonfinite="skip")


def figures(count: int, *, seed: int = 0) -> list[tuple[float, float]]:
    """Return falling losses and gradient norms, with noise."""
    draw = random.Random(seed)
    return [(4.0 / (1 + step / 50) + draw.gauss(0, 0.1), draw.lognormvariate(0, 0.3)) for step in range(count)]


def check_all(outliers: OutlierFilter, values: list[tuple[float, float]]) -> list[Decision]:
    return [outliers.check(loss=loss, grad_norm=norm) for loss, norm in values]


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_z_scores_are_those_of_numpy(offset: float) -> None:
    draw = random.Random(1)
    values = [offset + draw.gauss(3, 2) for _ in range(3 * WINDOW)]
    outliers = OutlierFilter(HealthConfig())
    for index, value in enumerate(values):
        before = np.array(values[max(0, index - WINDOW) : index])
        z = outliers.check(loss=value, grad_norm=1.0).loss_z
        if index < MIN_VALUES:
            assert z is None
        else:
            assert z == pytest.approx((value - before.mean()) / before.std(), abs=1e-6)
    assert outliers.state()["losses"] == values[-WINDOW:]


def test_there_is_no_z_score_for_equal_values_or_nan() -> None:
    assert [z_score([2.0] * WINDOW, value) for value in (2.0, 3.0)] == [None] * 2
    assert z_score(range(WINDOW), 1.0) is not None
    assert [z_score(range(WINDOW), value) for value in (math.nan, math.inf, -math.inf)] == [None] * 3


@pytest.mark.parametrize(("loss", "grad_norm"), [(math.nan, 1.0), (2.0, math.inf), (math.nan, math.nan)])
def test_a_step_that_is_not_finite_stops_or_is_skipped_as_configured(loss: float, grad_norm: float) -> None:
    stopped = OutlierFilter(HealthConfig()).check(loss=loss, grad_norm=grad_norm)
    assert stopped == Decision(None, None, "stop", f"loss {loss:.6g} and gradient norm {grad_norm:.6g}", 0)
    assert OutlierFilter(SKIP).check(loss=loss, grad_norm=grad_norm).action == "skip"


@pytest.mark.parametrize("spike", [(9.0, 1.0), (2.0, 30.0)])
def test_a_spike_of_either_figure_is_skipped_and_stays_out_of_the_window(spike: tuple[float, float]) -> None:
    outliers, undisturbed = OutlierFilter(HealthConfig(skip_z=6.0)), OutlierFilter(HealthConfig(skip_z=6.0))
    values = figures(100)
    assert check_all(outliers, values) == check_all(undisturbed, values)
    decision = outliers.check(loss=spike[0], grad_norm=spike[1])
    assert decision.action == "skip"
    assert max(decision.loss_z or 0.0, decision.grad_norm_z or 0.0) > 6.0
    assert f"(z {decision.loss_z:.1f}) and gradient norm {spike[1]:g} (z {decision.grad_norm_z:.1f})" in decision.reason
    more = figures(20, seed=1)
    assert check_all(outliers, more) == check_all(undisturbed, more)


def test_low_values_are_no_spikes_and_without_skip_z_nothing_is() -> None:
    outliers = OutlierFilter(HealthConfig(skip_z=3.0))
    check_all(outliers, figures(100))
    low = outliers.check(loss=-50.0, grad_norm=0.0)
    assert low.action == "update"
    assert low.loss_z is not None
    assert low.loss_z < -3.0
    indifferent = OutlierFilter(HealthConfig())
    check_all(indifferent, figures(100))
    assert indifferent.check(loss=50.0, grad_norm=50.0).action == "update"


def test_too_many_skips_in_a_row_stop_the_run() -> None:
    outliers = OutlierFilter(SKIP)
    for _ in range(2):
        assert {decision.action for decision in check_all(outliers, [(math.nan, 1.0)] * MAX_SKIPS)} == {"skip"}
        assert outliers.check(loss=1.0, grad_norm=1.0).action == "update"
    last = check_all(outliers, [(math.nan, 1.0)] * (MAX_SKIPS + 1))[-1]
    assert (last.action, last.skips) == ("stop", MAX_SKIPS)
    assert f"at most {MAX_SKIPS} in a row" in HealthConfig.__dataclass_fields__["on_nonfinite"].metadata["help"]


def test_a_restored_filter_decides_as_the_original_does() -> None:
    config = HealthConfig(on_nonfinite="skip", skip_z=1.5)
    values = figures(300)
    for index in (5, 50, 51, 52, 200):
        values[index] = (math.nan, 1.0)
    whole = check_all(OutlierFilter(config), values)
    assert {decision.action for decision in whole} == {"update", "skip"}
    for cut in (0, 1, 20, 52, 201):
        first, second = OutlierFilter(config), OutlierFilter(config)
        head = check_all(first, values[:cut])
        second.restore(json.loads(json.dumps(first.state(), allow_nan=False)))
        assert head + check_all(second, values[cut:]) == whole
