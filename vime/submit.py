"""`vime submit`: plan a run and submit it, or run it on this machine with `--cluster local`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from vime.cli import build_parser, command, split_flags
from vime.errors import BadInput
from vime.launch.prepare import claim_folder, start, write_code
from vime.planning.request import check_fits, plan_from
from vime.planning.show import render
from vime.recipe.flags import flag, recipe_options
from vime.recipe.load import as_yaml, load_flags, load_recipe
from vime.recipe.schema import Recipe, help_texts
from vime.recipe.script import read_script, render_script
from vime.run.folder import write_plan
from vime.run.plan import Plan
from vime.run.scheduler import find_scheduler
from vime.system.redact import redact


def list_options(recipe: Recipe) -> str:
    """Every option of the recipe as a flag, with its value and meaning."""
    lines = []
    for name, target in recipe_options().items():
        group = getattr(recipe, target.group)
        about = help_texts(type(group)).get(target.field)
        lines.append(f"{flag(name)} {getattr(group, target.field)}" + (f"   # {about}" if about else ""))
    return "\n".join(lines)


@command
def main(argv: Sequence[str]) -> int:
    own, flags = split_flags(argv)
    parser = build_parser(
        "python -m vime.submit", "Plan a run and submit it, or run it on this machine with --cluster local."
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and the batch script, submit nothing")
    parser.add_argument(
        "--from-script", metavar="FILE", help="read another trainer's launch script, without running it"
    )
    parser.add_argument(
        "--write-recipe", metavar="FILE", help="with --from-script: write what it amounts to as a recipe"
    )
    args = parser.parse_args(own)
    if args.from_script:
        return _from_script(Path(args.from_script), args.write_recipe)
    if args.write_recipe:
        raise BadInput(
            f"--write-recipe {args.write_recipe} writes what a script amounts to: give --from-script with it"
        )
    if args.flags:
        raise BadInput(f"unexpected argument {args.flags[0]!r}: options of the recipe follow --")
    if args.list_options:
        print(list_options(load_recipe(args.recipe, flags)))
        return 0
    writes = not args.dry_run or args.run_dir is not None
    plan = plan_from(args, flags, required=not args.dry_run, run_folder=writes)
    plan = plan.model_copy(update={"command": tuple(argv)})
    if args.dry_run:
        return _dry_run(plan, write=args.run_dir is not None)
    check_fits(plan)
    scheduler = find_scheduler(plan.cluster.kind)
    # Before anything is written: a run that would be refused leaves no folder behind.
    scheduler.check(plan)
    start(plan)
    return scheduler.submit(plan)


def _from_script(path: Path, target: str | None) -> int:
    """Shows what becomes of a script's flags, and the recipe; writes it where asked. Nothing is submitted."""
    script = read_script(path)
    loaded = load_flags(path.stem, script.flags)
    text = as_yaml(loaded.recipe)
    print(render_script(script))
    print("\n".join(("Recipe", *(f"  {line}" for line in text.splitlines()))))
    for note in loaded.notes:
        print(f"note: {note}")
    if target is None:
        return 0
    try:
        with open(target, "x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise BadInput(f"--write-recipe {target}: {error.strerror}: give a new file that can be written") from error
    print(f"recipe written to {target}: python -m vime.submit --recipe {target} submits it")
    return 0


def _dry_run(plan: Plan, *, write: bool) -> int:
    scheduler = find_scheduler(plan.cluster.kind)
    print(render(plan))
    for preview in scheduler.preview(plan):
        print(redact(f"{preview.title}\n\n{preview.text}"))
    if write:
        claim_folder(plan)
        write_code(plan)
        print(f"plan written to {write_plan(plan)}")
        for path in scheduler.write_scripts(plan):
            print(f"script written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
