"""The vLLM that is installed is asked only when it is not the one the table was made from."""

from __future__ import annotations

import pytest

from vime.errors import BadInput
from vime.recipe import tables, vllm_arguments


def test_the_pinned_version_is_not_imported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vllm_arguments, "_names", lambda: pytest.fail("vLLM was imported"))
    for version in (None, tables.VLLM_VERSION):
        monkeypatch.setattr(vllm_arguments, "installed_version", lambda version=version: version)
        vllm_arguments.check_installed(["max_num_seqs"])


def test_another_version_decides_by_its_own_arguments(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vllm_arguments, "installed_version", lambda: "0.99.0")
    monkeypatch.setattr(vllm_arguments, "_names", lambda: {"max_num_seqs"})
    vllm_arguments.check_installed(["max_num_seqs", "no_max_num_seqs"])
    with pytest.raises(BadInput, match=r"--vllm-old-name: the installed vLLM 0\.99\.0 has no engine argument old_name"):
        vllm_arguments.check_installed(["old_name"])
