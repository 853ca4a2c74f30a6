"""Charts keep what matters of many points, choose round ticks, and escape what they are told."""

from hypothesis import given
from hypothesis import strategies as st

from vime.observe.charts import Series, line_chart, thin, ticks
from vime.observe.page import routing_by_layer


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=3000))
def test_thinning_keeps_extremes_order_and_the_bound(values):
    points = [(float(i), v) for i, v in enumerate(values)]
    kept = thin(points, 400)
    assert len(kept) <= 400
    assert min(v for _, v in kept) == min(values)
    assert max(v for _, v in kept) == max(values)
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_few_inside_and_evenly_apart(low, span):
    marks = ticks(low, low + span)
    assert 1 <= len(marks) <= 6
    assert all(low - span * 1e-6 <= mark <= low + span * (1 + 1e-6) for mark in marks)


def test_a_chart_tells_its_values_in_words_and_escapes_its_labels():
    chart = line_chart("<b>reward", [Series("a&b", [(0, 0.5), (9, 0.75)])])
    assert "&lt;b&gt;reward. a&amp;b: 0.5 at 0, 0.75 at 9" in chart
    assert "<b>" not in chart


def test_a_metric_that_was_never_written_has_no_chart():
    assert line_chart("x", [Series("x", [])]) == ""


def test_routing_is_drawn_over_the_layers_of_the_first_and_the_last_rollout():
    steps = {0: {"routing/differs/layer_03": 0.25, "routing/differs/layer_11": 0.5}, 1: {"a": 1.0}}
    steps[2] = {"routing/differs/layer_11": 0.125, "routing/differs/layer_03": 0.0}
    lines = routing_by_layer(steps)
    assert lines == [Series("rollout 0", [(3.0, 0.25), (11.0, 0.5)]), Series("rollout 2", [(3.0, 0.0), (11.0, 0.125)])]
    assert ">layer<" in line_chart("by layer", lines, axis="layer")
    assert routing_by_layer({0: {"routing/differs": 0.1}}) == []
