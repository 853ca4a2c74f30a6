"""The report: one file, no script and no network, escaped, quick to open in a real browser even for a long run."""

import base64
import hashlib
import html.parser
import itertools
import re
import time
from pathlib import Path

import pytest

import vime
from tests.support.browser import open_page
from tests.support.synthetic import HOSTILE, synthetic_run
from vime.observe.browse import SCRIPT, policy
from vime.observe.charts import COLOURS
from vime.observe.document import STYLE
from vime.observe.page import CHARTS
from vime.report import main, write_report


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    run = synthetic_run(tmp_path_factory.mktemp("long"), 3000)
    return run, write_report(run)


def test_the_last_line_names_run_rewards_and_report(long_run):
    run, line = long_run
    assert line.startswith(f"{run.name}: mean reward 0.")
    assert line.endswith(f"report {run / 'report.html'}")


def test_three_thousand_rollouts_make_less_than_five_megabytes(long_run):
    assert (long_run[0] / "report.html").stat().st_size < 5e6


def test_the_file_is_private(long_run):
    assert (long_run[0] / "report.html").stat().st_mode & 0o777 == 0o600


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.data, self.marked, self.open = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.marked.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.data.append(data)


@pytest.fixture(scope="module")
def page(long_run):
    return Page((long_run[0] / "report.html").read_text())


def test_what_the_model_wrote_is_text_and_nothing_is_fetched(page):
    scripts = [attributes.get("type") for tag, attributes in page.marked if tag == "script"]
    assert scripts.count(None) == 1
    assert set(scripts) == {None, "application/json", "text/plain"}
    policies = [attributes.get("content") for tag, attributes in page.marked if "http-equiv" in attributes]
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    assert policies == [policy()]
    assert f"script-src 'sha256-{digest}'" in policy()
    assert "default-src 'none'" in policy()
    # The SVG's namespace is a name, not an address that is fetched.
    assert not {"src", "href", "action"} & {
        name for name, value in page.attributes if not (value or "").startswith("#")
    }
    assert any("<script>" in data for data in page.data)
    assert "\u202e" not in "".join(page.data)
    assert not any(name.startswith("on") for name, _ in page.attributes)


def test_every_section_that_a_person_looks_for_is_there(page):
    sections = [attributes["id"] for tag, attributes in page.marked if tag == "section"]
    assert sections == [
        "outcome", "curves", "evaluation", "timeline", "placement", "preflight", "samples", "checkpoints",
        "configuration", "events",
    ]  # fmt: skip
    links = [value for name, value in page.attributes if name == "href"]
    assert {f"#{section}" for section in sections} <= set(links)


def test_best_and_worst_stand_side_by_side_with_the_label(long_run):
    text = (long_run[0] / "report.html").read_text()
    first = text.split('id="samples"')[1].split('<div class="two">')[1].split("</details>")[0]
    assert first.count("<article") == 2
    assert "Best: reward 1<" in first
    assert "Worst: reward 0<" in first
    assert first.count("Label: <code>&lt;script&gt;") == 2


def test_the_wait_of_every_rank_is_told(page):
    said = next(a["aria-label"] for tag, a in page.marked if tag == "svg" and "Wait of each rank" in a["aria-label"])
    assert "waits longest" in said
    assert sum("rank 127" in data for data in page.data) > 0


def test_the_command_and_the_one_that_goes_on_are_there_to_copy(page):
    blocks = [data for data in page.data if data.startswith("python -m vime.submit")]
    assert len(blocks) == 2
    assert "--nodes 16 -- --lr 2e-6" in blocks[1]
    assert blocks[0].startswith("python -m vime.submit --recipe deepseek-r1 --nodes 16 --run-name 'synthetic")
    assert blocks[0].endswith("-- --lr 2e-6")


def test_every_picture_says_what_it_shows_and_headings_are_in_order(page):
    pictures = [attributes for tag, attributes in page.marked if tag == "svg"]
    assert len(pictures) > 15
    assert all(picture.get("role") == "img" and len(picture.get("aria-label") or "") > 10 for picture in pictures)
    headings = [int(tag[1]) for tag in page.tags if tag in ("h1", "h2", "h3", "h4")]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(after - before <= 2 for before, after in itertools.pairwise(headings))


def test_what_scrolls_can_be_reached_by_keyboard_and_has_a_name(page):
    regions = [a for tag, a in page.marked if a.get("role") == "region" or tag == "pre"]
    assert regions
    assert all(a.get("tabindex") == "0" and a.get("aria-label") for a in regions)
    assert page.marked[next(i for i, (tag, _) in enumerate(page.marked) if tag == "a")][1]["class"] == "skip"


def colours(css: str) -> tuple[dict[str, str], dict[str, str]]:
    """The variables of the light and of the dark page."""
    light, dark = css.split("@media (prefers-color-scheme:dark)", 1)
    both = [dict(re.findall(r"--([\w-]+):(#[0-9a-f]{3,6})", part.split("*{", 1)[0])) for part in (light, dark)]
    return both[0], {**both[0], **both[1]}


def luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(c * 2 for c in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """WCAG 2.2's ratio."""
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_text_has_the_contrast_of_wcag_aa_and_lines_that_of_graphics(mode):
    found = colours(STYLE)[mode]
    for text in ("fg", "dim", "link", "good", "bad", "warn"):
        for ground in ("bg", "card", "sunk"):
            assert contrast(found[text], found[ground]) >= 4.5, (text, ground)
    for name in ("good", "bad", "warn"):
        assert contrast(found[name], found[f"{name}bg"]) >= 4.5, name
    for line in (
        *(f"s{n}" for n in range(COLOURS)),
        "p-generate",
        "p-train",
        "p-sync",
        "p-save",
        "p-log_probs",
        "p-reward",
    ):
        assert contrast(found[line], found["card"]) >= 3, line


def test_every_curve_is_of_a_metric_that_the_code_writes():
    """A renamed metric would leave an empty place and no error."""
    root = Path(vime.__file__).parent
    text = "\n".join(path.read_text() for path in root.rglob("*.py") if path.name != "page.py")
    for _, lines, _ in CHARTS:
        for name, _ in lines:
            group, short = name.split("/")
            assert f'"{name}"' in text or f'"{short}"' in text or f"/{short}" in text, name
            assert group in ("rollout", "train", "perf", "routing")


def test_a_failed_run_shows_its_cause_where_it_was_and_what_to_do(tmp_path):
    run = synthetic_run(tmp_path, 3, cause="OUT_OF_MEMORY")
    write_report(run)
    text = (run / "report.html").read_text()
    assert '<span class="pill bad">out of memory</span>' in text
    assert "stage train, node node03" in text
    assert "docs/faults.md#out-of-memory" in text
    assert HOSTILE not in text


def test_a_run_without_an_end_is_not_called_a_success(tmp_path):
    run = synthetic_run(tmp_path, 3)
    lines = (run / "events.jsonl").read_text().splitlines(keepends=True)
    (run / "events.jsonl").write_text("".join(lines[:-1]))
    write_report(run)
    assert '<span class="pill warn">running or cut off</span>' in (run / "report.html").read_text()


def test_a_run_of_nothing_yet_has_a_report(tmp_path):
    run = synthetic_run(tmp_path, 1)
    for name in ("events.jsonl", "metrics.jsonl", "timeline.jsonl"):
        (run / name).unlink()
    assert "no rollout finished" in write_report(run)


def test_a_run_that_does_not_exist_is_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert main(["no-such-run"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.e2e
def test_chromium_opens_a_long_run_in_under_two_seconds(long_run, tmp_path):
    """Against an empty page in the same run, since starting the browser is most of the time."""

    def opened(address, *options):
        start = time.monotonic()
        text = open_page(address, tmp_path, *options)
        return time.monotonic() - start, text

    address = (long_run[0] / "report.html").as_uri()
    opened("about:blank", "--dump-dom")
    empty = min(opened("about:blank", "--dump-dom")[0] for _ in range(2))
    pages = [opened(address, "--dump-dom") for _ in range(2)]
    assert min(seconds for seconds, _ in pages) - empty < 2
    dom = pages[0][1]
    assert "<title>owned" not in dom
    assert 'data-found="80"' in dom
    assert dom.count("<svg") >= 15
    picture = tmp_path / "page.png"
    opened(address, f"--screenshot={picture}", "--window-size=1300,2000")
    assert picture.stat().st_size > 50_000
