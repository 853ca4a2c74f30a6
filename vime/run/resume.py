"""Command that resumes a run: the one that started it, with the same run folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vime.run.plan import Plan

_REPLACED = ("--run-dir", "--runs-dir", "--run-name", "--base-dir")


def resume_command(plan: Plan) -> tuple[str, ...]:
    """Words of the command. Training resumes from the newest checkpoint below `--load`, by default the run's own."""
    own, flags = _parts(plan)
    place = ["--run-name", plan.run_name, "--run-dir", plan.run_dir]
    place += ["--base-dir", plan.base_dir] if plan.base_dir else []
    return ("python", "-m", "vime.submit", *own, *place, *(("--", *flags) if flags else ()))


def _parts(plan: Plan) -> tuple[list[str], list[str]]:
    """The command's options except those that set the place, and the recipe's flags."""
    words = list(plan.command)
    if not words:
        # An old plan, without its command.
        return ["--recipe", plan.recipe.name, "--nodes", str(len(plan.nodes)), "--cluster", plan.cluster.name], []
    end = words.index("--") if "--" in words else len(words)
    return list(_without_place(words[:end])), words[end + 1 :]


def _without_place(words: Sequence[str]) -> Iterator[str]:
    skip = False
    for word in words:
        if skip:
            skip = False
        elif word in _REPLACED:
            skip = True
        elif word.split("=")[0] not in _REPLACED and word != "--dry-run":
            yield word
