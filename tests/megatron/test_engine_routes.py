"""The engine's routes reach exactly the routers that compute the token, whatever the layout, and are replayed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.route_problem import FULL, HF, Problem
from tests.support.single import one_process
from vime.errors import DataError
from vime.megatron.attention_layout import local_tokens
from vime.megatron.microbatch import Padding, RolloutTokens, padded_lengths
from vime.megatron.routes import EngineRoutes, differing_shares
from vime.recipe.parallel import ParallelLayout
from vime.run.routes import RoutesFile, write_routes

LAYERS, TOP_K, EXPERTS = 5, 2, 300


def row(sample: int, token: int, layer: int) -> list[int]:
    """Different experts for every token and layer, beyond one byte."""
    first = (7 * sample + 31 * token + 97 * layer) % EXPERTS
    return [first, (first + 1 + layer) % EXPERTS]


def rows_of(data: RolloutTokens) -> list[np.ndarray]:
    return [
        np.array(
            [[row(sample, token, layer) for layer in range(LAYERS)] for token in range(len(sequence) - 1)], np.uint16
        ).reshape(len(sequence) - 1, LAYERS, TOP_K)
        for sample, sequence in enumerate(data.sequences)
    ]


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12)), min_size=1, max_size=6),
    tp=st.sampled_from([1, 2, 4]),
    cp=st.sampled_from([1, 2]),
    pp=st.sampled_from([1, 2]),
)
def test_each_router_gets_the_rows_of_the_tokens_it_sees_in_its_layers(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[tuple[int, int]], tp: int, cp: int, pp: int
) -> None:
    layout = ParallelLayout(tp * cp * pp, tp=tp, cp=cp, pp=pp, sequence_parallel=tp > 1)
    data = RolloutTokens.of([([1] * prompt, [2] * response) for prompt, response in lengths])
    path = tmp_path_factory.mktemp("routes") / "run" / "000000.routes"
    write_routes(path, rows_of(data), experts=EXPERTS)
    members = list(range(len(lengths)))[::-1]
    padded = padded_lengths(data, members, Padding.of(layout))
    seen = 0
    for rank in range(layout.world_size):
        coords = layout.coordinates(rank)
        layers = [layer for layer in range(LAYERS) if layer % pp == coords.pp and layer > 0]
        found = EngineRoutes(RoutesFile(path), data, layers, EXPERTS, layout, coords).of(members)
        mine = np.split(local_tokens(padded, coords.cp, cp), tp)[coords.tp]
        starts = np.cumsum([0, *padded])
        for number, layer in enumerate(layers):
            for place, token in enumerate(mine):
                member = int(np.searchsorted(starts, token, side="right")) - 1
                at = int(token - starts[member])
                known = member < len(members) and at < len(data.sequences[members[member]]) - 1
                wanted = row(members[member], at, layer) if known else [-1, -1]
                assert found[number][place].tolist() == wanted
                seen += known
    assert seen == (LAYERS - 1) * sum(len(sequence) - 1 for sequence in data.sequences)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([0, 0], r"sample 1 of the rollout: the routes of token 2 in layer 3 are \[0, 0\], not 2 different ones"),
        ([4, EXPERTS], r"routes of token 2 in layer 3 are \[4, 300\], not 2 different ones of 300 experts"),
    ],
    ids=["nobody filled it", "no such expert"],
)
def test_a_row_that_cannot_be_right_names_sample_token_and_layer(
    tmp_path: Path, wrong: list[int], message: str
) -> None:
    data = RolloutTokens.of([([1, 2], [3, 4]), ([1, 2], [3, 4, 5])])
    rows = rows_of(data)
    rows[1][2, 3] = wrong
    rows[0][1, 0] = [0, 0]  # a layer without experts: nobody fills it, and nobody reads it
    write_routes(tmp_path / "run" / "r", rows, experts=EXPERTS)
    layout = ParallelLayout()
    engines = EngineRoutes(
        RoutesFile(tmp_path / "run" / "r"), data, [1, 2, 3, 4], EXPERTS, layout, layout.coordinates(0)
    )
    engines.of([0])
    with pytest.raises(DataError, match=message):
        engines.of([0, 1])


def test_a_file_with_too_few_rows_or_cut_short_is_an_error(tmp_path: Path) -> None:
    data, layout = RolloutTokens.of([([1, 2], [3, 4])]), ParallelLayout()
    path = tmp_path / "run" / "r"
    write_routes(path, [rows_of(data)[0][:-1]], experts=EXPERTS)
    with pytest.raises(DataError, match="sample 0 of the rollout has 2 rows of routes for 4 tokens"):
        EngineRoutes(RoutesFile(path), data, [1], EXPERTS, layout, layout.coordinates(0)).of([0])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="not whole"):
        RoutesFile(path)


@pytest.mark.parametrize("options", [{}, FULL], ids=["plain", "recomputed"])
def test_replayed_routes_give_the_log_probs_and_gradients_of_the_model_that_chose_them(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    with one_process() as layout:
        problem = Problem(layout, replay="engine", **options)
        chosen, wanted = problem.rows(), problem.log_probs()
        expected = problem.gradients()
        path = tmp_path / "run" / "r"
        write_routes(path, chosen, experts=HF["n_routed_experts"])
        engines = EngineRoutes(
            RoutesFile(path), problem.data, problem.routes.layers, HF["n_routed_experts"], layout, layout.coordinates(0)
        )
        problem.routes.take(lambda key: engines.of(problem.packed[key[1]]))
        assert torch.equal(problem.log_probs(problem.routes.replaying), wanted)
        same = differing_shares(problem.routes, HF["num_hidden_layers"], torch.device("cpu"))
        assert same["routing/differs"] == 0
        assert {f"routing/differs/layer_{layer:02d}" for layer in problem.routes.layers} < set(same)

        problem.routes.take(lambda key: engines.of(problem.packed[key[1]]))
        problem.move_routers()
        assert not torch.allclose(problem.log_probs(), wanted)
        # Last tokens have no routes: the experts' batches change, and with them how sums are rounded.
        torch.testing.assert_close(problem.log_probs(problem.routes.replaying), wanted, rtol=0, atol=1e-5)
        moved = differing_shares(problem.routes, HF["num_hidden_layers"], torch.device("cpu"))
        assert 0.1 < moved["routing/differs"] <= 1
        found = problem.gradients(problem.routes.replaying)
        for name, gradient in expected.items():
            torch.testing.assert_close(gradient, found[name], rtol=1e-4, atol=1e-6, msg=name)
        # The second pass counts nothing more.
        assert differing_shares(problem.routes, HF["num_hidden_layers"], torch.device("cpu")) == moved
        problem.routes.forget()
        assert not torch.allclose(problem.log_probs(), wanted)
        problem.optimizer.close()
