"""Routes of an answer are checked, and stitched over the answers of a continued sample."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.stub_engine import choice
from vime.errors import DataError
from vime.rollout.client import EngineAnswer, parse_answer
from vime.rollout.routes import RouteBook, RoutesAsked, RouteShape
from vime.run.routes import RoutesFile, routes_path
from vime.samples import Sample

SHAPE = RouteShape(layers=3, top_k=2, experts=8)


def routes(rows: int, first: int = 0) -> np.ndarray:
    """Rows that differ, numbered from `first`."""
    return np.arange(first * 6, (first + rows) * 6, dtype=np.uint8).reshape(rows, 3, 2)


def answer(tokens: list[int], found: np.ndarray | str | None, reason: str = "stop") -> bytes:
    text = found
    if isinstance(found, np.ndarray):
        file = io.BytesIO()
        np.save(file, found)
        text = base64.b64encode(file.getvalue()).decode()
    return json.dumps({"choices": [choice(tokens, reason) | {"routed_experts": text}]}).encode()


def test_an_answer_brings_a_row_for_every_token_but_the_last() -> None:
    asked = RoutesAsked(SHAPE, start=0, prompt=4)
    generated = parse_answer(answer([1, 2], routes(5)), 8, asked)
    assert np.array_equal(generated.routes, routes(5))
    assert parse_answer(answer([1, 2], routes(5)), 8).routes is None


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (None, "answer has no routes"),
        (routes(4), r"shape \[4, 3, 2\] instead of \[5, 3, 2\]"),
        (routes(6), r"shape \[6, 3, 2\] instead of \[5, 3, 2\]"),
        (routes(5)[:, :2], r"shape \[5, 2, 2\] instead of \[5, 3, 2\]"),
        (routes(5).astype(np.float32), "routes have type float32"),
        ("!", "routes are no npy file"),
        (base64.b64encode(b"nothing").decode(), "routes are no npy file"),
    ],
)
def test_missing_padded_or_foreign_routes_are_an_error(found: Any, said: str) -> None:
    with pytest.raises(EngineAnswer, match=said) as caught:
        parse_answer(answer([1, 2], found), 8, RoutesAsked(SHAPE, start=0, prompt=4))
    assert caught.value.retry


def test_rows_of_a_continued_sample_are_stitched_and_written_with_their_layers_first(tmp_path: Path) -> None:
    book = RouteBook(SHAPE, tmp_path)
    whole, other = Sample(5, 1, "", [1, 2, 3]), Sample(6, 1, "", [1, 2, 3])
    # Aborted before the first token: nothing is known, and the next answer brings the prompt's rows too.
    asked = book.ask(whole)
    assert (asked.start, asked.prompt) == (0, 3)
    book.add(whole, asked.decode(None, 0))
    # Aborted after two tokens: the second one was never computed with, so it has no row yet.
    book.add(whole, asked.decode(encoded(routes(4)), 2))
    whole.response_ids += [7, 8]
    asked = book.ask(whole)
    assert (asked.start, asked.prompt) == (4, 5)
    book.add(whole, asked.decode(encoded(routes(3, first=4)), 3))
    whole.response_ids += [9, 9, 9]
    assert book.covers(whole)
    book.write(3, [whole, other])
    file = RoutesFile(routes_path(tmp_path, 3))
    assert np.array_equal(file.of(0), routes(7).transpose(1, 0, 2))
    assert file.of(1).shape == (3, 0, 2)
    assert routes_path(tmp_path, 3).stat().st_mode & 0o777 == 0o600


def encoded(rows: np.ndarray) -> str:
    file = io.BytesIO()
    np.save(file, rows)
    return base64.b64encode(file.getvalue()).decode()


def test_a_sample_without_all_its_rows_is_not_written_and_named(tmp_path: Path) -> None:
    book, sample = RouteBook(SHAPE, tmp_path), Sample(5, 1, "", [1, 2, 3], response_ids=[4, 5])
    assert not book.covers(sample)
    book.add(sample, routes(3))
    with pytest.raises(DataError, match="sample 5 has 3 rows of routes for 5 tokens"):
        book.write(0, [sample])
    book.keep([])
    assert book.ask(sample).start == 0
