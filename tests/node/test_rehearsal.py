"""The run's needs, tried on one node before the first byte is converted."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.support import patience
from tests.support.plans import plan_of
from tests.support.small_base import write_deepseek
from vime.errors import BadInput
from vime.node import rehearsal
from vime.node.rehearsal import check_libraries, check_plugins, check_profiler, check_prompts, libraries, rehearse
from vime.recipe.load import load_recipe
from vime.run.folder import write_plan
from vime.run.plan import Plan

ROOT = Path(__file__).parents[2]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_deepseek(tmp_path / "base")
    return tmp_path / "base"


def planned(base: Path, *flags: str) -> Plan:
    return plan_of("tiny-deepseek-r1", *flags, nodes=1, base=base, run_dir=base / "run")


def test_a_run_that_is_ready_says_what_was_tried(base: Path) -> None:
    tried = list(rehearse(planned(base)))
    assert tried[0].startswith("2 prompts rendered, the first has ")
    assert tried[-1] == "all scales are finite"


def test_the_stage_reports_its_result_or_ends_as_bad_input(base: Path) -> None:
    (base / "run").mkdir()
    plan = planned(base)
    write_plan(plan)
    command = [sys.executable, "-m", "vime.node.rehearsal", "--run", plan.run_dir]
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience.PROCESS, cwd=ROOT)
    assert (done.returncode, "all scales are finite" in done.stdout) == (0, True), done.stderr
    (base / "tiny-deepseek-r1" / "tokenizer.json").write_text("{}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience.PROCESS, cwd=ROOT)
    assert done.returncode == 2
    assert "error: no tokenizer can be read from" in done.stderr


def test_a_template_that_fails_is_named_with_its_row(base: Path) -> None:
    file = base / "tiny-deepseek-r1" / "tokenizer_config.json"
    (base / "tiny-deepseek-r1" / "chat_template.jinja").unlink(missing_ok=True)
    broken = {"chat_template": "{{ raise_exception('roles have to alternate') }}"}
    file.write_text(json.dumps({**json.loads(file.read_text()), **broken}))
    with pytest.raises(BadInput, match=r"--prompt-data: .*train\.jsonl row 1: the chat template refuses it: .*roles"):
        list(check_prompts(planned(base)))


def test_a_scale_that_is_not_a_number_is_found_wherever_it_is(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path, *, quantised: bool, most: int | None = None) -> None:
        assert (folder, quantised, most) == (base / "tiny-deepseek-r1", True, None)
        raise BadInput("a scale holds NaN")

    monkeypatch.setattr(rehearsal, "check_scales", refuse)
    with pytest.raises(BadInput, match="a scale holds NaN"):
        list(rehearse(planned(base)))


PLUGINS = {
    "raises.py": ("import no_such_library\n", "No module named 'no_such_library'"),
    "dies.py": ("import os\nos._exit(3)\n", "exit code 3"),
    "killed.py": ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n", "signal 9"),
    "broken.py": ("def score(sample):\n    return 1\nraise RuntimeError('no GPU here')\n", "no GPU here"),
    "value.py": ("score = 1\n", "is a int, not a function"),
}


@pytest.mark.parametrize("name", PLUGINS)
def test_a_plug_in_that_cannot_be_loaded_is_named_with_its_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    text, said = PLUGINS[name]
    (tmp_path / name).write_text(text)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    module = name.removesuffix(".py")
    with pytest.raises(BadInput) as caught:
        list(check_plugins(load_recipe("tiny-deepseek-r1", ["--rm-type", f"{module}:score"])))
    assert str(caught.value).startswith(f"--rm-type {module}:score cannot be loaded here: ")
    assert said in str(caught.value)


def test_every_plug_in_of_a_recipe_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("def score(samples): ...\ndef keep(group): ...\ndef chances(histories): ...\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    flags = ["--rm-type", "group:mine:score", "--dynamic-sampling-filter-path", "mine:keep"]
    recipe = load_recipe("tiny-deepseek-r1", [*flags, "--curriculum", "mine:chances"])
    assert list(check_plugins(recipe)) == ["mine:score", "mine:keep", "mine:chances"]


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--attention-backend", "auto"], []),
        (["--moe-enable-deepep", "--moe-token-dispatcher-type", "flex"], ["deep_ep"]),
        (["--vllm-all2all-backend", "deepep_low_latency"], ["deep_ep"]),
        (["--attention-backend", "flash"], ["transformer_engine.pytorch", "flash_attn"]),
        (["--attention-backend", "fused"], ["transformer_engine.pytorch"]),
        (["--use-precision-aware-optimizer"], ["transformer_engine.pytorch"]),
        (["--use-precision-aware-optimizer", "--optimizer-cpu-offload"], []),
    ],
)
def test_a_recipe_turns_libraries_on(flags: list[str], wanted: list[str]) -> None:
    assert [library.module for library in libraries(load_recipe("tiny-deepseek-r1", flags))] == wanted


def test_a_library_that_cannot_be_imported_is_named_with_what_else_to_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The modules are files of this test: a real DeepEP wants a GPU and a network."""
    (tmp_path / "deep_ep.py").write_text("raise ImportError('libnvshmem_host.so.3: cannot open shared object file')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    flags = ("--attention-backend", "auto")
    plan = plan_of("deepseek-r1", *flags, nodes=16, cluster="example")
    with pytest.raises(BadInput) as caught:
        list(check_libraries(plan))
    assert "--moe-enable-deepep needs deep_ep, which cannot be imported here (ImportError: libnvshmem" in str(
        caught.value
    )
    assert "or give --no-moe-enable-deepep --moe-token-dispatcher-type alltoall" in str(caught.value)
    (tmp_path / "deep_ep.py").write_text("")
    assert list(check_libraries(plan)) == ["deep_ep"]
    on_processors = plan_of("tiny-deepseek-r1", "--attention-backend", "flash", nodes=1)
    assert list(check_libraries(on_processors)) == []


def test_nsight_systems_is_looked_for_where_ranks_run_under_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--profile-ranks", "0", "--profile-rollouts", "3", "--profiler")
    plan = plan_of("deepseek-r1", *flags, "nsys", nodes=16, cluster="example")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        BadInput, match="nsys is not on the path here: install Nsight Systems, or give --profiler torch"
    ):
        list(check_profiler(plan))
    for name in ("nsys", "python"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    with pytest.raises(BadInput, match=f"the first python on the path, which is {tmp_path}/python"):
        list(check_profiler(plan))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{tmp_path}")
    assert list(check_profiler(plan)) == [f"{tmp_path}/nsys"]
    monkeypatch.setenv("PATH", "")
    assert list(check_profiler(plan_of("deepseek-r1", *flags, "torch", nodes=16, cluster="example"))) == []


class Server(http.server.BaseHTTPRequestHandler):
    """A real reward server; `answers` is what it says to the prompt it is asked about."""

    answers: ClassVar[tuple[int, str]] = (200, "0.25")
    asked: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        Server.asked.append(json.loads(self.rfile.read(length)))
        status, text = Server.answers
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server() -> Iterator[str]:
    Server.answers, Server.asked = (200, "0.25"), []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}/score"
        running.shutdown()
        thread.join()


def test_a_reward_server_is_asked_about_the_first_prompt(base: Path, server: str) -> None:
    tried = list(rehearse(planned(base, "--rm-type", "remote", "--rm-url", server)))
    assert "the reward server answered 0.25" in tried
    (request,) = Server.asked
    assert (request["prompt"], request["label"]) == ("0+1=", "1")
    assert request["response"]


@pytest.mark.parametrize(("answers", "said"), [((404, "no such page"), "status 404"), ((200, "fine"), "a number")])
def test_a_reward_server_that_gives_no_reward_is_refused(base: Path, server: str, answers, said: str) -> None:
    Server.answers = answers
    with pytest.raises(BadInput, match=rf"--rm-url {server}: .*{said}.*: start the server, or correct its address"):
        list(rehearse(planned(base, "--rm-type", "remote", "--rm-url", server)))


def test_a_reward_server_that_is_away_is_waited_for_and_then_refused(
    base: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "SERVER_S", 0.2)
    away = "http://127.0.0.1:9/score"
    with pytest.raises(BadInput, match=r"was away for 0\.2 s"):
        list(rehearse(planned(base, "--rm-type", "remote", "--rm-url", away)))
