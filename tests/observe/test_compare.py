"""Runs side by side: options that differ, curves in the same charts, and nothing of a run's text as markup."""

import json

from hypothesis import given
from hypothesis import strategies as st

from tests.support.synthetic import synthetic_run
from vime.observe.compare import differences
from vime.report import main

SETTINGS = st.dictionaries(
    st.sampled_from(["a", "b", "c"]),
    st.integers(0, 2) | st.dictionaries(st.sampled_from(["x", "y"]), st.integers(0, 2)),
)


@given(st.lists(SETTINGS, min_size=1, max_size=4))
def test_equal_options_are_left_out_and_differing_ones_have_a_value_for_each(settings):
    found = differences(settings)
    assert all(len(values) == len(settings) for values in found.values())
    assert all(len(set(map(str, values))) > 1 for values in found.values())
    assert differences([settings[0]] * 3) == {}


def test_nested_options_are_dotted():
    assert differences([{"a": {"x": 1, "y": 2}}, {"a": {"x": 3, "y": 2}}]) == {"a.x": [1, 3]}


def with_learning_rate(run, rate):
    path = run / "plan.json"
    plan = json.loads(path.read_text())
    plan["recipe"]["optimizer"]["lr"] = rate
    path.write_text(json.dumps(plan))
    return run


def test_two_runs_share_their_charts(tmp_path, capsys):
    one = synthetic_run(tmp_path / "a", 30, name="one")
    other = with_learning_rate(synthetic_run(tmp_path / "b", 20, name="<script>&'"), 5e-6)
    assert main([str(one), str(other)]) == 0
    assert capsys.readouterr().out == f"2 runs compared: {one / 'compare.html'}\n"
    text = (one / "compare.html").read_text()
    assert "<script" not in text
    assert (one / "compare.html").stat().st_mode & 0o777 == 0o600
    assert "<td>lr</td><td>1e-06</td><td>5e-06</td>" in text
    first = text.split("<figcaption>Mean reward, all finished groups")[1].split("</figure>")[0]
    assert first.count("<polyline") == 2
    assert "30 of 3000" in text
    assert "20 of 3000" in text


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    runs = [synthetic_run(tmp_path / name, 5, name="same") for name in "ab"]
    assert main([*map(str, runs), "--output", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    assert all(f"<td>{run}</td>" in text for run in runs)


def test_an_output_for_one_run_or_in_no_folder_is_refused(tmp_path, capsys):
    run = synthetic_run(tmp_path, 1, name="one")
    assert main([str(run), "--output", "x.html"]) == 2
    assert main([str(run), str(run), "--output", str(tmp_path / "missing" / "x.html")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
