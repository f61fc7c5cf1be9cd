"""The ranks of chapter 6 as its equations say, what thresholds realise, and the figures of both."""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib.pyplot as plt
import numpy as np
import pytest

from tracealign_lib.calibration import calibration_rank, simulate_guarantee
from tracealign_lib.experiments import shield_figures, shield_promises
from tracealign_lib.experiments.shield_promises import ABOVE, MEAN_RATE, realised_name


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    plt.close("all")


def test_the_ranks_of_the_equations_are_those_of_the_library() -> None:
    for n in range(22, 140):
        assert shield_promises.marginal_rank(n, 0.1) == calibration_rank(n, alpha=0.1)
        assert shield_promises.umbrella_rank(n, 0.1, 0.1) == calibration_rank(n, alpha=0.1, delta=0.1)


def test_the_tail_is_that_of_the_binomial() -> None:
    assert shield_promises.tail(3, 2, 0.5) == pytest.approx(0.5)
    assert shield_promises.tail(22, 22, 0.1) == pytest.approx(0.9**22)


def test_the_table_of_needed_texts_is_the_corollary() -> None:
    table = shield_promises.needed_table((0.1, 0.05), (0.1, 0.05))
    assert table.to_numpy().tolist() == [["0.1", 9, 22, 29], ["0.05", 19, 45, 59]]


@pytest.mark.parametrize(("n", "alpha"), [(22, 0.1), (20, 0.05), (100, 0.03), (7, 0.1)])
def test_a_roc_point_is_the_lowest_threshold_that_these_texts_allow(n: int, alpha: float) -> None:
    scores = np.arange(n)
    rank = shield_promises.roc_rank(n, alpha)
    assert np.mean(scores > scores[rank - 1]) <= alpha
    assert np.mean(scores > scores[rank - 2]) > alpha


def test_of_three_thresholds_two_keep_their_promise() -> None:
    frame = shield_promises.guarantee_frame(np.arange(2000), n=22, alpha=0.1, delta=0.1).set_index(
        "threshold"
    )
    assert frame["rank"].to_dict() == {"ROC point": 20, "marginal": 21, "umbrella": 22}
    assert frame["promise"]["ROC point"] == "mean at most 0.13"
    assert frame["mean"]["ROC point"].low <= 3 / 23
    assert frame["mean"]["marginal"].low <= 0.1 < frame["mean"]["ROC point"].low
    assert frame["exceeded"]["umbrella"].low <= 0.1 < frame["exceeded"]["marginal"].low
    assert shield_promises.guarantee_table(frame.reset_index())["mean rate"][1].startswith("0.08")


def test_for_some_sizes_the_roc_point_is_the_conformal_threshold() -> None:
    same = [n for n in range(9, 120) if shield_promises.roc_rank(n, 0.1) == calibration_rank(n, alpha=0.1)]
    assert same == list(range(9, 120, 10))


def test_the_figure_of_a_promise_says_the_numbers_that_it_draws() -> None:
    frame = shield_promises.guarantee_frame(np.arange(500), n=22, alpha=0.1, delta=0.1, repeats=200)
    figure, alt = shield_figures.guarantee_figure(frame, 0.1, 0.1)
    drawn = [line.get_xdata() for line in figure.axes[0].get_lines()[:3]]
    assert [np.mean(rates) for rates in drawn] == pytest.approx([i.estimate for i in frame["mean"]])
    assert f"umbrella: mean {frame['mean'][2].estimate:.3f}" in alt


def test_realised_rates_keep_to_alpha_on_a_continuous_pool() -> None:
    frame = shield_promises.realised_frame(
        np.random.default_rng(0).normal(size=5000), n=60, alphas=(0.05, 0.2), delta=0.1, repeats=800
    )
    assert frame["alpha"].tolist() == [0.05, 0.2]
    assert (frame["mean"] <= frame["alpha"] + 0.01).all()
    assert (frame["mean"] > frame["alpha"] / 2).all()
    assert (frame["high"] <= frame["alpha"] + 0.01).all()
    figure, alt = shield_figures.realised_figure(frame, 60, 0.1)
    assert len(figure.axes[0].lines) == 3
    assert "alpha 0.05: mean" in alt


def test_what_worlds_realise_is_pooled_and_shown_beside_each_of_them() -> None:
    pools = [np.arange(2000), np.random.default_rng(1).normal(size=900)]
    settings = {"alphas": (0.1,), "delta": 0.1, "n": 30, "repeats": 300}
    values = shield_promises.realised_values(pools, **settings)
    mean, above = values[realised_name(0.1, MEAN_RATE)], values[realised_name(0.1, ABOVE)]
    assert mean.n == above.n == 600
    assert 0.05 < mean.estimate <= 0.11
    runs = [
        simulate_guarantee(pool, n=30, alpha=0.1, delta=0.1, repeats=300, seed=k)
        for k, pool in enumerate(pools)
    ]
    assert above.estimate == pytest.approx(sum(run.exceeded.estimate for run in runs) / 2)
    assert above.low <= 0.1
    alone = {str(n): shield_promises.realised_values([pool], **settings) for n, pool in enumerate(pools)}
    each = [world[realised_name(0.1, MEAN_RATE)].estimate for world in alone.values()]
    assert min(each) < mean.estimate < max(each)
    published = {**values, "per seed": alone}
    [row] = shield_promises.realised_table(alone["0"], published, MEAN_RATE, (0.1,)).to_dict("records")
    assert row["alpha"] == "0.1"
    assert row["this run"].startswith(f"{each[0]:.3f} [")
    assert row["published worlds"].startswith(f"{mean.estimate:.3f} [")
    assert row["each world"] == f"{each[0]:.3f}, {each[1]:.3f}"


def test_a_pool_without_ties_breaks_the_umbrella_as_often_as_promised_and_not_always() -> None:
    values = shield_promises.realised_values(
        [np.random.default_rng(2).normal(size=4000)], alphas=(0.2,), delta=0.1, n=50, repeats=1000
    )
    assert 0.02 < values[realised_name(0.2, ABOVE)].estimate < 0.12
