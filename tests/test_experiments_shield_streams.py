"""Streams stop where a check refuses, and the share that is out by then is counted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from bci_samples import answered_pipeline
from shield_samples import text

from tracealign_lib.bci import SpanLength
from tracealign_lib.experiments import shield, shield_streams
from tracealign_lib.experiments.bci_texts import JUDGE, UNSAFE
from tracealign_lib.experiments.shield_texts import calibration_texts
from tracealign_lib.pipeline import Pipeline
from tracealign_lib.stats import Interval


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    with answered_pipeline(tmp_path_factory.mktemp("cache")) as smoke:
        yield smoke


def test_streams_stop_where_a_check_refuses_and_before_the_span_is_out(pipeline: Pipeline) -> None:
    texts = calibration_texts(pipeline)
    frame = shield_streams.stream_frame(shield.recommended_shield(pipeline), texts)
    assert (frame["stopped"] == frame["refused"]).all()
    assert set(frame["stopped"]) == {True, False}
    stopped, passed = frame[frame["stopped"]], frame[~frame["stopped"]]
    assert (stopped["released"] <= stopped["span"]).all()
    assert (stopped["read"] < stopped["tokens"]).any()
    assert (passed["released"] == passed["tokens"]).all()
    assert passed["span"].isna().all()
    share = shield_streams.released_share(frame)
    assert share.estimate == pytest.approx((stopped["released"] / stopped["tokens"]).mean())


def test_without_drift_there_is_no_stream_and_no_share(pipeline: Pipeline) -> None:
    frame = shield_streams.stream_frame(shield.paper_shield(pipeline), [])
    assert len(frame[frame["stopped"]]) == 0
    assert shield_streams.released_share(frame).n == 0


def test_the_span_of_a_stream_is_the_first_above_the_threshold(pipeline: Pipeline) -> None:
    first, second = (item.recipe for item in pipeline.world.of_kind("unsafe")[:2])
    index, length = pipeline.unsafe_index, SpanLength()
    short = index.tokenizer.decode(index.encode(first)[:10].tolist())
    joined = text(UNSAFE, "u", JUDGE, f"{short}; {second}")
    spans = index.spans(index.encode(joined.text), min_length=8)
    strict = shield.make_shield(pipeline, "unsafe spans", length, 15.0)
    [row] = shield_streams.stream_frame(strict, [joined]).itertuples()
    assert row.stopped
    assert row.span == next(s.start for s in spans if s.end - s.start > 15) > spans[0].start
    assert 0 < row.released <= row.span


def test_headlines_of_streams_are_over_all_texts_and_over_those_that_stopped(pipeline: Pipeline) -> None:
    texts = calibration_texts(pipeline)
    frame = shield_streams.stream_frame(shield.recommended_shield(pipeline), texts)
    values = shield_streams.stream_values(frame)
    assert values[shield_streams.STOPPED].estimate == pytest.approx(frame["stopped"].mean())
    assert values[shield_streams.RELEASED] == shield_streams.released_share(frame)
    assert values[shield_streams.RELEASED].n < values[shield_streams.STOPPED].n
    none = shield_streams.stream_values(shield_streams.stream_frame(shield.paper_shield(pipeline), []))
    assert {value.n for value in none.values()} == {0}


def test_streams_of_this_run_stand_beside_the_published_worlds() -> None:
    stopped, out = Interval(0.5, 0.25, 0.75, 4), Interval(0.2, 0.1, 0.3, 2)
    values = {shield_streams.STOPPED: stopped, shield_streams.RELEASED: out}
    published = {**values, "per seed": {"3": values, "4": {**values, shield_streams.RELEASED: stopped}}}
    first, second = shield_streams.stream_table(values, published).to_dict("records")
    assert (first["drift, judged half"], first["each world"]) == ("stopped", "0.50, 0.50")
    assert (second["drift, judged half"], second["each world"]) == ("share out when stopped", "0.20, 0.50")
    assert second["this run"].startswith("0.20 [0.10,")
