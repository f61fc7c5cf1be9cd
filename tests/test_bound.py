"""The theorems of the drift bound against exhaustive enumeration, hand calculation and scipy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from bound_samples import BASE, QUICK, RISKY, alphas, documents, enumerate_windows, planted_pair, texts_of
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from tracealign_lib import bound
from tracealign_lib.bound import certify, clopper_pearson_upper
from tracealign_lib.errors import ParameterError
from tracealign_lib.index import TraceIndex
from tracealign_lib.ngram import NGramModel

# --- T0 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("context", [[], [1], [2, 0]])
@pytest.mark.parametrize("risky", RISKY)
def test_drift_is_at_most_the_union_bound(order, context, risky) -> None:
    model = NGramModel(BASE, vocab_size=3, order=order, alpha=0.4)
    probability, found = enumerate_windows(model, context, risky)
    drift = probability[found.any(axis=0)].sum()
    assert drift <= bound.union_bound(model.expected_windows(risky, 6, context)) <= 1.0


def test_union_bound_is_capped_and_refuses_nonsense() -> None:
    assert bound.union_bound([0.1, 0.2]) == pytest.approx(0.3)
    assert bound.union_bound([0.9, 0.2]) == 1.0
    assert bound.union_bound([]) == 0.0
    for wrong in ([-0.1], [math.nan], [math.inf]):
        with pytest.raises(ParameterError, match="expected number"):
            bound.union_bound(wrong)


def test_risky_windows_are_matched_rare_windows(tmp_path) -> None:
    index = TraceIndex.build_tokens(
        [np.array([0, 1, 2, 3, 0, 1]), np.array([0, 1, 2, 3]), np.array([4, 4, 4])], tmp_path, vocab_size=6
    )
    texts = np.array([[5, 0, 1, 2, 3, 5], [4, 4, 3, 0, 1, 5]])
    for length, threshold, most in itertools.product((1, 2, 3), (0.0, 3.0, 4.5), (None, 1, 2)):
        expected = [
            [
                1 <= index.count(window) <= (most or 99) and index.surprisal[window].sum() > threshold
                for window in (row[s : s + length] for s in range(6 - length + 1))
            ]
            for row in texts
        ]
        found = bound.risky_windows(index, texts, length=length, threshold=threshold, max_count=most)
        assert found.tolist() == expected
    assert bound.risky_windows(index, texts, length=9, threshold=0.0).shape == (2, 0)
    with pytest.raises(ParameterError, match="finite"):
        bound.risky_windows(index, texts, length=2, threshold=math.nan)


# --- T1 ------------------------------------------------------------------------------------------


BASES = ([], [[0, 2]] * 10 + [[1, 2]] * 10, [[0, 1, 2, 0, 1, 1]])


@pytest.fixture(scope="module")
def cases() -> list[bound.Planting]:
    """Every span after every context on three letters: orders 0 to 2, lengths 1 to 4."""
    grid = itertools.product(BASES, (0.1, 1.0), (1, 5), ((0, 2), (0, 4), (1, 1), (1, 2), (1, 3), (2, 2)))
    return [
        case
        for base, alpha, copies, (order, length) in grid
        for case in bound.enumerate_planting(base, copies, length=length, order=order, alpha=alpha)
    ]


def test_t1_holds_in_every_case(cases) -> None:
    assert len(cases) >= 2000
    assert not any(case.corrected_fails for case in cases)


def test_the_short_form_fails_only_where_a_gram_repeats(cases) -> None:
    """(1 + m / alpha)^l is true without repeated grams, and false with them."""
    failures = [case for case in cases if case.stated_fails]
    assert failures
    assert all(case.repetition > 1 for case in failures)
    assert any(contexts_repeat(case) and case.repetition == 1 for case in cases)  # and none of them failed


def contexts_repeat(case: bound.Planting) -> bool:
    """Whether two tokens of the span stand in the same context, such as 1 and 2 in 0 1 0 2."""
    order, text = len(case.context), (*case.context, *case.span)
    contexts = [text[i : i + order] for i in range(len(case.span))]
    return order > 0 and len(set(contexts)) < len(contexts)


def test_the_smallest_counterexample_by_hand() -> None:
    """Planting 0000 once: 1/3 becomes 5/7 for each token, so growth is (15/7)^4 = 21.1, above 2^4."""
    case = bound.plant([], [0, 0, 0, 0], 1, [0, 0, 0, 0], vocab_size=3, order=0, alpha=1.0)
    assert math.exp(case.growth) == pytest.approx((15 / 7) ** 4)
    assert math.exp(case.stated) == pytest.approx(16)
    assert math.exp(case.corrected) == pytest.approx(5**4)
    assert case.stated_fails
    assert not case.corrected_fails


def test_two_tokens_suffice_once_the_context_is_frequent() -> None:
    """0 0 after 0 in a corpus with ten '0 2': (1 / 13)^2 becomes (3 / 15)^2, 6.76 times, above 4."""
    case = bound.plant([[0, 2]] * 10, [0, 0, 0], 1, [0, 0], [0], vocab_size=3, order=1, alpha=1.0)
    assert math.exp(case.growth) == pytest.approx((3 / 15 * 13) ** 2)
    assert case.stated == pytest.approx(math.log(4))
    assert case.stated_fails


@pytest.mark.parametrize("span", [[0, 1, 0], [0, 0, 0], [1, 1, 0]])
def test_the_corrected_constant_is_the_smallest(span) -> None:
    """With each context followed ever more often by a token outside the span, the bound is approached."""
    shares = []
    for times in (1, 100, 10_000):
        contexts = {tuple(([0, *span])[i : i + 1]) for i in range(3)}
        base = [[*context, 3] for context in sorted(contexts) for _ in range(times)]
        case = bound.plant(base, [0, *span], 2, span, [0], vocab_size=4, order=1, alpha=0.5)
        assert not case.corrected_fails
        shares.append(math.exp(case.growth - case.corrected))
    assert shares == sorted(shares)
    assert shares[-1] > 0.99


@given(documents, documents, st.lists(st.integers(0, 2), min_size=1, max_size=5), st.integers(0, 2), alphas)
@QUICK
def test_t1_with_any_planted_documents(base, planted, span, order, alpha) -> None:
    """Whatever is planted, wrappers and repeated spans included, added grams bound the growth."""
    options = {"vocab_size": 3, "order": order}
    before = NGramModel(base, **options, alpha=alpha).span_log_prob(span)
    after = NGramModel([*base, *planted], **options, alpha=alpha).span_log_prob(span)
    added = bound.added_counts(planted, span, **options)
    assert after - before <= bound.gram_log_multiplier(added, alpha) + 1e-9
    if added.max() > 0:
        assert after - before <= bound.log_multiplier(int(added.max()), len(span), alpha) + 1e-9


@given(st.integers(0, 50), st.integers(1, 40), alphas, st.integers(1, 5))
@QUICK
def test_multiplier_is_monotone(copies, length, alpha, repetition) -> None:
    def value(m, tokens, r):
        return bound.log_multiplier(m, tokens, alpha, repetition=r)

    here = value(copies, length, repetition)
    assert 0 <= here < value(copies + 1, length, repetition)
    assert here <= value(copies, length + 1, repetition)
    assert here <= value(copies, length, repetition + 1)
    assert here == pytest.approx(length * math.log(1 + repetition * copies / alpha))


@given(st.integers(0, 50), st.integers(1, 40), st.floats(0, 200), alphas, st.integers(1, 1000))
@QUICK
def test_drift_bound_is_monotone(copies, length, threshold, alpha, windows) -> None:
    def value(m=copies, tokens=length, tau=threshold, n=windows):
        return bound.drift_bound(m, tokens, tau, alpha=alpha, windows=n)

    assert 0 <= value() <= 1
    assert value() <= min(value(m=copies + 1), value(tokens=length + 1), value(n=windows + 1))
    assert value(tau=threshold + 1.0) <= value()


def test_drift_bound_by_hand() -> None:
    value = bound.drift_bound(3, 4, 20.0, alpha=0.5, repetition=2, gain=1.5, windows=7)
    assert value == pytest.approx(7 * (1 + 2 * 3 / 0.5) ** 4 * math.exp(1.5 - 20.0))
    assert bound.drift_bound(3, 8, 20.0, alpha=0.5) == pytest.approx(7.0**8 * math.exp(-20.0))
    assert bound.drift_bound(16, 8, 20.0, alpha=0.5) == 1.0


def test_drift_bound_is_never_below_the_exact_probability() -> None:
    """T0, T1 and the corollary end to end: every set of one or two planted spans, enumerated."""
    steps, alpha, order = 5, 0.5, 1
    texts = texts_of(steps)
    base = [[0, 2, 1], [2, 1, 2], [1, 2]] * 3
    for span in itertools.permutations(range(3), 3):
        document = [0, *span]
        without = NGramModel(base, vocab_size=3, order=order, alpha=alpha)
        full = NGramModel([*base, document, document], vocab_size=3, order=order, alpha=alpha)
        counts = np.bincount(np.concatenate([*base, document, document]), minlength=3)
        bci = -np.log((counts + 1) / (counts.sum() + 3))[list(span)].sum()
        gain = max(
            bound.context_gain(without.span_log_prob(span, context), bci) for context in ([], [0], [1], [2])
        )
        once = bound.added_counts([document], document, vocab_size=3, order=order)
        limit = bound.drift_bound(
            2, 3, bci - 1e-9, alpha=alpha, repetition=int(once.max()), gain=gain, windows=steps - 2
        )
        windows = np.lib.stride_tricks.sliding_window_view(texts, 3, axis=1)
        drifts = (windows == span).all(axis=-1).any(axis=1)
        exact = np.exp(full.token_log_probs(texts).sum(axis=1))[drifts].sum()
        assert exact <= limit
        assert limit > 0


def test_counts_and_repetition_by_hand() -> None:
    added = bound.added_counts([[0, 0, 0, 1]] * 2, [0, 0, 1], [0], vocab_size=3, order=1)
    assert added.tolist() == [4, 4, 2]
    assert bound.gram_log_multiplier(added, 2.0) == pytest.approx(math.log(3 * 3 * 2))


# --- T2 ------------------------------------------------------------------------------------------


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.001, 0.5))
@QUICK
def test_clopper_pearson_is_scipys(counts, delta) -> None:
    hits, n = counts
    exact = binomtest(hits, n, alternative="less").proportion_ci(confidence_level=1 - delta, method="exact")
    assert float(clopper_pearson_upper(hits, n, delta)) == pytest.approx(exact.high, abs=1e-9)


@pytest.mark.parametrize("kappa", [-1.0, 0.0, 0.5, 1.0, 2.0, 4.0])
def test_t2_by_enumeration(kappa: float) -> None:
    """All texts of four tokens and 300 random events; under the other tail the claim would be false."""
    full, without = planted_pair()
    top, bottom = (model.token_log_probs(texts_of(4)).sum(axis=1) for model in (full, without))
    tail = np.exp(top)[top - bottom > kappa].sum()
    events = np.random.default_rng(0).random((300, 81)) < 0.3
    assert (events @ np.exp(top) <= math.exp(kappa) * (events @ np.exp(bottom)) + tail + 1e-12).all()
    if kappa in (0.0, 1.0, 2.0):
        wrong_tail = np.exp(bottom)[top - bottom > kappa].sum()
        worst = top - bottom > kappa
        assert np.exp(top)[worst].sum() > math.exp(kappa) * np.exp(bottom)[worst].sum() + wrong_tail


def test_under_the_other_tail_t2_can_also_be_true() -> None:
    """(0.55, 0.45) against (0.5, 0.5) at kappa = 0: no event refutes it, so it is false in general only."""
    top, bottom = np.array([0.55, 0.45]), np.array([0.5, 0.5])
    tail = bottom[np.log(top / bottom) > 0].sum()
    for event in itertools.product((False, True), repeat=2):
        assert top[list(event)].sum() <= bottom[list(event)].sum() + tail


def test_a_certificate_by_hand() -> None:
    ratios = np.array([0.0] * 90 + [1.5] * 8 + [math.inf] * 2)
    result = certify(ratios, 0.01, kappas=(1.0, 2.0), delta=0.1)
    tails = [
        binomtest(k, 100, alternative="less").proportion_ci(confidence_level=0.95, method="exact").high
        for k in (10, 2)
    ]
    assert result.tail_limits == pytest.approx(tails)
    assert result.bounds == pytest.approx([math.e * 0.01 + tails[0], math.e**2 * 0.01 + tails[1]])
    assert (result.kappa, result.bound) == (2.0, pytest.approx(result.bounds[1]))
    assert result.floor == pytest.approx(1 - 0.05 ** (1 / 100))
    counted = certify(ratios, (0, 50), kappas=(1.0, 2.0), delta=0.1)
    assert counted.event_limit == pytest.approx(1 - (0.1 / 3) ** (1 / 50))
    assert counted.bound > result.bound


def test_a_longer_grid_costs_and_a_bound_is_a_probability() -> None:
    ratios = np.zeros(50)
    short = certify(ratios, 0.0, kappas=(1.0,))
    assert short.bound == pytest.approx(short.floor)
    assert certify(ratios, 0.0, kappas=(1.0, 2.0, 3.0)).floor > short.floor
    assert certify(ratios, 1.0, kappas=(800.0,)).bound == 1.0


def test_the_grid_for_a_likely_event_holds_the_kappa_that_tells_equal_models() -> None:
    """With L = 0 everywhere and P_-A(E) = 0.8, kappa = 0 gives 0.8 and the floor; below 0 nothing helps."""
    same = np.zeros(256)
    found = certify(same, 0.8, kappas=bound.kappas_for(0.8))
    assert found.bound == pytest.approx(0.8 + found.floor)
    assert certify(same, 0.8, kappas=np.log(np.array(bound.FIRST_TERMS) / 0.8).tolist()).bound == 1.0


@given(st.floats(-5.0, -0.01), st.integers(0, 1000))
@QUICK
def test_below_kappa_0_the_tail_is_large(kappa, seed) -> None:
    """P_D(L > kappa) >= 1 - e^kappa: the reason that `kappas_for` has no kappa below 0."""
    top, bottom = np.random.default_rng(seed).dirichlet(np.full(6, 0.5), size=2)
    assert top[np.log(top / bottom) > kappa].sum() >= 1 - math.exp(kappa) - 1e-9


@pytest.mark.parametrize("limits", [1, 11])
def test_samples_needed_is_the_smallest_number(limits: int) -> None:
    needed = bound.samples_needed(0.02, 0.05, limits=limits)
    assert bound.monte_carlo_floor(needed, 0.05, limits=limits) <= 0.02
    assert bound.monte_carlo_floor(needed - 1, 0.05, limits=limits) > 0.02


def test_the_grid_for_an_event_gives_the_first_term_its_values() -> None:
    for event in (1e-12, 0.02, 1.0):
        first = np.exp(bound.kappas_for(event)) * event
        assert first == pytest.approx(np.maximum(bound.FIRST_TERMS, event))
    assert bound.kappas_for(0.5, (0.25, 0.75)) == pytest.approx((0.0, math.log(1.5)))
    for wrong in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(ParameterError, match="out of range"):
            bound.kappas_for(wrong)
    with pytest.raises(ParameterError, match="first term"):
        bound.kappas_for(0.5, (1.0,))


def test_too_few_samples_say_how_many() -> None:
    needed = bound.samples_needed(0.02, 0.05, limits=11)
    with pytest.raises(ParameterError, match=f"at least {needed} samples"):
        certify(np.zeros(needed - 1), 0.0, precision=0.02)
    assert certify(np.zeros(needed), 0.0, precision=0.02).bound <= 0.02
    more = bound.samples_needed(0.02, 0.05, limits=12)  # the event's own limit is one more
    with pytest.raises(ParameterError, match=f"at least {more} samples"):
        certify(np.zeros(10_000), (0, more - 1), precision=0.02)


# --- T3 ------------------------------------------------------------------------------------------


def emissions(rng: np.random.Generator, items: int) -> pd.DataFrame:
    """Made-up items of three lengths each, with noise that an item's rows share."""
    copies = 2.0 ** rng.integers(0, 5, size=items)
    frame = pd.DataFrame({"item": range(items), "copies": copies, "shift": rng.normal(0, 0.1, items)})
    frame = frame.merge(pd.DataFrame({"length": [4, 8, 16]}), how="cross")
    frame["context"] = rng.choice([8, 16, 32], size=len(frame))
    mean = 0.2 + 0.1 * np.log2(frame["copies"]) - 0.05 * np.log2(frame["length"] / 4)
    frame["emission"] = np.clip(mean + frame["shift"], 0, 1)
    return frame


def fit(frame: pd.DataFrame, alpha: float = 0.2, seed: int = 0) -> bound.EmissionFit:
    columns = (frame[name] for name in ("copies", "length", "context", "emission", "item"))
    return bound.fit_emission(*columns, alpha=alpha, seed=seed)


def test_fit_recovers_a_line() -> None:
    rng = np.random.default_rng(0)
    copies, lengths, contexts = (2.0 ** rng.integers(0, 5, size=60) for _ in range(3))
    shares = 0.3 + 0.1 * np.log2(copies) - 0.05 * np.log2(lengths) + 0.02 * np.log2(contexts)
    result = bound.fit_emission(copies, lengths, contexts, shares, range(60))
    assert (result.intercept, *result.per_doubling) == pytest.approx((0.3, 0.1, -0.05, 0.02))
    assert result.margin == pytest.approx(0.0, abs=1e-9)
    assert result.line(copies, lengths, contexts) == pytest.approx(shares)
    assert (result.fitted, result.calibrated) == (30, 30)


def test_the_margin_is_the_conformal_quantile() -> None:
    """With a line fitted on the other half, the margin is that order statistic of the excesses."""
    frame = emissions(np.random.default_rng(1), 40)
    result = fit(frame)
    excess = frame["emission"] - result.line(frame["copies"], frame["length"], frame["context"])
    worst = excess.groupby(frame["item"]).max()
    assert np.isclose(worst, result.margin).sum() == 1
    held = np.random.default_rng(0).permutation(40)[:20]
    assert (worst[held] <= result.margin + 1e-12).sum() == math.ceil(21 * 0.8)


def test_conformal_coverage_by_simulation() -> None:
    """New items lie wholly below the limit in at least 80 % of 400 trials, and not in nearly all."""
    below = []
    for seed in range(400):
        frame = emissions(np.random.default_rng(seed), 41)
        old, new = frame[frame["item"] < 40], frame[frame["item"] == 40]
        limit = fit(old, seed=seed).upper(new["copies"], new["length"], new["context"])
        below.append(bool((new["emission"] <= limit + 1e-12).all()))
    interval = binomtest(sum(below), 400).proportion_ci(method="exact")
    assert interval.high >= 0.8
    assert interval.low <= 0.9


def test_too_few_items_say_how_many() -> None:
    frame = emissions(np.random.default_rng(2), 18)
    with pytest.raises(ParameterError, match="at least 38 clusters"):
        fit(frame, alpha=0.05)
    assert fit(frame, alpha=0.1).calibrated == 9
    with pytest.raises(ParameterError, match="at least 18 clusters"):
        fit(frame[frame["item"] < 17], alpha=0.1)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("delta", [0.0, 1.0, -0.1, 5, math.nan])
def test_delta_and_alpha_are_shares(delta: float) -> None:
    frame = emissions(np.random.default_rng(3), 40)
    for call in (
        lambda: certify([0.0], 0.1, delta=delta),
        lambda: clopper_pearson_upper(1, 2, delta),
        lambda: bound.samples_needed(0.1, delta),
        lambda: bound.samples_needed(delta, 0.1),
        lambda: bound.monte_carlo_floor(10, delta),
        lambda: fit(frame, alpha=delta),
    ):
        with pytest.raises(ParameterError, match=r"not in \(0, 1\)"):
            call()


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.inf, math.nan])
def test_the_pseudo_count_is_positive(alpha: float) -> None:
    for call in (
        lambda: bound.log_multiplier(1, 2, alpha),
        lambda: bound.gram_log_multiplier([1, 2], alpha),
        lambda: bound.drift_bound(1, 2, 20.0, alpha=alpha),
    ):
        with pytest.raises(ParameterError, match="not positive"):
            call()


@pytest.mark.parametrize("kappas", [(), (math.inf,), (math.nan,), ((1.0, 2.0),)])
def test_the_grid_of_kappa_is_finite_and_not_empty(kappas) -> None:
    with pytest.raises(ParameterError, match="grid of kappa"):
        certify([0.0], 0.1, kappas=kappas)


@pytest.mark.parametrize("ratios", [[], [math.nan], [[0.0]]])
def test_log_ratios_are_numbers(ratios) -> None:
    with pytest.raises(ParameterError, match="log-ratios"):
        certify(ratios, 0.1)


@pytest.mark.parametrize("event", [-0.1, 1.1, math.nan])
def test_the_event_has_a_probability(event: float) -> None:
    with pytest.raises(ParameterError, match="event's probability"):
        certify([0.0], event)
    with pytest.raises(ParameterError, match="Hits are not counts"):
        certify([0.0], (3, 2))


@pytest.mark.parametrize(
    "call",
    [
        lambda: bound.log_multiplier(-1, 2, 0.5),
        lambda: bound.log_multiplier(1, 0, 0.5),
        lambda: bound.log_multiplier(1.5, 2, 0.5),
        lambda: bound.log_multiplier(1, 2, 0.5, repetition=0),
        lambda: bound.gram_log_multiplier([], 0.5),
        lambda: bound.gram_log_multiplier([-1], 0.5),
        lambda: bound.drift_bound(1, 2, math.nan, alpha=0.5),
        lambda: bound.drift_bound(1, 2, 3.0, alpha=0.5, gain=math.inf),
        lambda: bound.drift_bound(1, 2, 3.0, alpha=0.5, windows=0),
        lambda: bound.fit_emission([0], [1], [1], [0.5], ["a"]),
        lambda: bound.fit_emission([1], [1], [1], [1.5], ["a"]),
        lambda: bound.fit_emission([1], [1], [1], [0.5], ["a", "b"]),
        lambda: bound.fit_emission([1], [1], [1], [0.5], [None]),
    ],
)
def test_other_bad_input(call) -> None:
    with pytest.raises(ParameterError):
        call()
