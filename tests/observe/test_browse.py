"""Search in the samples of a report: nothing that a model wrote leaves its text, and a page stays small enough."""

import base64
import gzip
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.browser import open_page
from tests.support.synthetic import HOSTILE, synthetic_run
from vime.observe.browse import browser, chosen
from vime.observe.samples import read_samples
from vime.report import write_report
from vime.system.text import visible

SIZES = st.dictionaries(st.integers(0, 5000), st.integers(1, 1000), min_size=1, max_size=60)


@given(SIZES, st.integers(1, 20_000))
def test_the_newest_rollout_is_always_there_and_the_rest_fits(sizes, most):
    kept = chosen(sizes, most)
    assert kept == sorted(set(kept))
    assert kept[-1] == max(sizes)
    assert len(kept) == 1 or sum(sizes[number] for number in kept) <= most
    if sum(sizes.values()) <= most:
        assert kept == sorted(sizes)


def sample(reward, response="text", prompt="question", **more):
    return {"index": 1, "reward": reward, "tokens": 5, "status": "completed", "label": "x", "response": response,
            "prompt": prompt, **more}  # fmt: skip


@given(st.text(max_size=60))
def test_no_text_ends_the_data_it_lies_in_and_all_of_it_is_there(text):
    page = browser({3: [sample(1.0, response=text), sample(None), sample(0.0, prompt=text)]})
    index, texts = re.findall(r'<script type="[a-z/]+" id="[\w-]+">([^<>]*)</script>', page)
    assert [row["place"] for row in json.loads(index)] == [0, 1]
    whole = json.loads(gzip.decompress(base64.b64decode(texts)))
    assert whole == [["question", visible(text)], [visible(text), "text"]]


def test_no_samples_no_search():
    assert browser({}) == ""
    assert browser({3: [sample(None)]}) == ""


def test_of_a_file_that_is_too_large_best_and_worst_are_read(tmp_path):
    path = tmp_path / "000000.jsonl"
    rows = [sample(float(number), index=number, response_ids=[1] * 50) for number in range(100)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row["index"] for row in read_samples(path, 4)] == [0, 1, 98, 99]
    assert len(read_samples(path)) == 100
    assert "response_ids" not in read_samples(path)[0]


@pytest.mark.e2e
@pytest.mark.parametrize(("words", "found"), [("needle", 1), ("NEEDLE", 1), ("document.title", 19 * 4), ("absent", 0)])
def test_a_browser_finds_what_a_sample_holds(words, found, tmp_path):
    run = synthetic_run(tmp_path, 19)
    path = run / "rollouts" / "000007.jsonl"
    path.write_text(path.read_text() + json.dumps(sample(1.0, response=f"{'hay ' * 30_000} Needle {HOSTILE}")) + "\n")
    write_report(run)
    dom = open_page((run / "report.html").as_uri() + f"#search={words}", tmp_path, "--dump-dom")
    assert f'data-found="{found + (words == "document.title")}"' in dom
    assert "<title>owned" not in dom


TURNS = [
    {"role": "model", "text": "<script>call()</script>", "tokens": 3},
    {"role": "tool", "text": "</pre><b>42</b>", "tokens": 5},
    {"role": "model", "text": "42", "tokens": 2},
]


def test_a_conversation_is_searched_turn_by_turn():
    page = browser({3: [sample(1.0, turns=TURNS)]})
    (texts,) = re.findall(r'<script type="text/plain" id="[\w-]+">([^<>]*)</script>', page)
    whole = json.loads(gzip.decompress(base64.b64decode(texts)))
    assert whole[0][2] == [["model", "<script>call()</script>"], ["tool", "</pre><b>42</b>"], ["model", "42"]]
    assert "<b>42" not in page


@pytest.mark.e2e
def test_a_browser_shows_a_conversation_turn_by_turn_and_as_text(tmp_path):
    run = synthetic_run(tmp_path, 3)
    turns = [
        {"role": "model", "text": "<script>document.title='owned'</script>call", "start": 0, "end": 3},
        {"role": "tool", "text": "</pre><b id=out>42</b>", "start": 3, "end": 8},
        {"role": "model", "text": "42", "start": 8, "end": 10},
    ]
    path = run / "rollouts" / "000002.jsonl"
    path.write_text(json.dumps(sample(1.0, response="42", turns=turns)) + "\n")
    write_report(run)
    text = (run / "report.html").read_text()
    assert '<li class="said"><span class="tag">model, 3 tokens</span>' in text
    assert '<li class="told"><span class="tag">tool, 5 tokens</span>' in text
    assert "&lt;/pre&gt;&lt;b id=out&gt;42" in text
    dom = open_page((run / "report.html").as_uri() + "#search=call", tmp_path, "--dump-dom")
    assert "<title>owned" not in dom
    assert "<b id" not in dom
    assert 'data-found="1"' in dom
