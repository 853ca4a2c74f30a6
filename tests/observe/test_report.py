"""The report: one file, no script and no network, escaped, quick to open in a real browser even for a long run."""

import html.parser
import shutil
import subprocess
import time

import pytest
from synthetic import HOSTILE, synthetic_run

from vime.report import main, write_report

BROWSER_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--virtual-time-budget=10000",
)  # fmt: skip


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
        self.tags, self.attributes, self.data = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.data.append(data)


def test_what_the_model_wrote_is_text_and_nothing_is_fetched(long_run):
    page = Page((long_run[0] / "report.html").read_text())
    assert "script" not in page.tags
    assert not {"src", "href"} & {name for name, value in page.attributes if not (value or "").startswith("#")}
    assert any("<script>" in data for data in page.data)


def test_every_picture_says_what_it_shows_and_headings_are_in_order(long_run):
    page = Page((long_run[0] / "report.html").read_text())
    assert page.tags.count("svg") == sum(name == "aria-label" and bool(value) for name, value in page.attributes) - 1
    headings = [tag for tag in page.tags if tag in ("h1", "h2", "h3")]
    assert headings[0] == "h1"
    assert headings.count("h1") == 1


def test_a_failed_run_shows_its_cause(tmp_path):
    run = synthetic_run(tmp_path, 3, cause="OUT_OF_MEMORY")
    write_report(run)
    text = (run / "report.html").read_text()
    assert 'class="bad"' in text
    assert "node03" in text
    assert HOSTILE not in text


def test_a_run_that_does_not_exist_is_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert main(["no-such-run"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.e2e
def test_chromium_opens_a_long_run_in_under_two_seconds(long_run, tmp_path):
    """Against an empty page in the same run, since starting the browser is most of the time."""
    browser = shutil.which("chromium")
    assert browser, "tools/test.sh installs Debian's chromium when it is root; install it or run tools/test.sh --fast"

    def seconds(address):
        command = [browser, *BROWSER_FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", address]
        start = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return time.monotonic() - start, done.stdout

    seconds("about:blank")
    empty = min(seconds("about:blank")[0] for _ in range(2))
    opened = [seconds((long_run[0] / "report.html").as_uri()) for _ in range(2)]
    assert min(time for time, _ in opened) - empty < 2
    dom = opened[0][1]
    assert "<title>owned" not in dom
    assert dom.count("<svg") >= 8
