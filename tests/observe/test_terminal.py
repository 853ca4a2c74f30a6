"""Terminal output says the same as the plain text, and nothing else reaches the terminal."""

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tests.support.plans import plan_of
from vime.observe.terminal import print_sections
from vime.planning.needs import needs_of, render_needs
from vime.planning.show import render, table
from vime.system.text import visible


def drawn(text, width=400, *, terminal=False):
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, highlight=False)
    print_sections(text, console)
    return console.file.getvalue()


@pytest.mark.parametrize(("recipe", "nodes", "cluster"), [("deepseek-r1", 16, "example"), ("tiny-qwen3", 1, "local")])
def test_a_drawn_plan_has_every_word_of_the_plain_one_in_order(recipe, nodes, cluster):
    plan = plan_of(recipe, nodes=nodes, cluster=cluster)
    text = f"{render(plan)}\n{render_needs(plan, needs_of(plan))}"
    assert sorted(drawn(text).split()) == sorted(text.split())
    styled = drawn(text, terminal=True)
    assert "\x1b[" in styled
    assert sorted(re.sub(r"\x1b\[[\d;]*m", "", styled).split()) == sorted(text.split())


WORDS = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=8)


@given(st.lists(st.lists(WORDS, min_size=3, max_size=3), min_size=1, max_size=5))
def test_no_cell_of_a_table_is_lost_and_markup_is_text(rows):
    text = "Title\n" + table(("a", "b", "c"), rows)
    assert sorted(drawn(text).split()) == sorted(text.split())


def test_control_characters_are_shown():
    said = drawn("Title\n  \x1b[31mred  \x1b]0;owned\x07\n  one  two\n")
    assert not {c for c in said if visible(c) != c}
    assert "\\u001b[31mred" in said
