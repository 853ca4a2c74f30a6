"""Placement map as SVG: one row per node, one cell per GPU, coloured by pipeline stage, with its engine below."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from vime.planning.show import engine_cells
from vime.run.plan import NodePlan, Plan, TrainerRank

CELL, ROW, LEFT, TOP, GAP = 118, 62, 92, 26, 6
HUES = (212, 28, 145, 275, 340, 185, 50, 5, 95, 240, 310, 165, 70, 15, 225, 125)
"""Hues of the pipeline stages, in turn; each stage also shows its number, so that colour is never the only mark."""
STYLE = """
svg.placement{font:12px system-ui,sans-serif;--cell-fill:93%;--cell-edge:42%;--map-fg:#1a1d21;--map-dim:#565d66}
@media (prefers-color-scheme:dark){svg.placement{--cell-fill:20%;--cell-edge:62%;--map-fg:#e6e8eb;--map-dim:#a3abb5}}
svg.placement text{fill:var(--map-fg);font-size:12px}
svg.placement text.small{fill:var(--map-dim);font-size:10.5px}
svg.placement text.bold{font-weight:600}
svg.placement rect.cell{fill:hsl(var(--h) 55% var(--cell-fill));stroke:hsl(var(--h) 45% var(--cell-edge))}
svg.placement rect.empty{fill:none;stroke:var(--map-dim);stroke-dasharray:3 3}
svg.placement rect.engine{fill:hsl(var(--h) 25% var(--cell-edge))}
"""


def placement_svg(plan: Plan, *, standalone: bool = True) -> str:
    """Draw the map. `standalone` embeds the style; inside a page, the page must include STYLE."""
    columns = max(node.gpus for node in plan.nodes)
    width, height = LEFT + columns * (CELL + GAP), TOP + len(plan.nodes) * (ROW + GAP) + 4
    about = (
        f"Placement on {len(plan.nodes)} nodes: {len(plan.trainer_ranks)} trainer ranks in "
        f"{plan.layout.pp} pipeline stages, {len(plan.servers)} engines. The table next to it says the same."
    )
    heads = (
        f'<text class="small" x="{LEFT + gpu * (CELL + GAP) + CELL / 2}" y="16" text-anchor="middle">GPU {gpu}</text>'
        for gpu in range(columns)
    )
    body = (part for number, node in enumerate(plan.nodes) for part in _node(plan, node, TOP + number * (ROW + GAP)))
    style = f"<style>{STYLE}</style>" if standalone else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="placement" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="{escape(about)}">{style}{"".join(heads)}{"".join(body)}</svg>\n'
    )


def _node(plan: Plan, node: NodePlan, y: int) -> Iterator[str]:
    ranks = {plan.trainer_ranks[rank].gpu: plan.trainer_ranks[rank] for rank in node.ranks}
    serving = {gpu: cell for index in node.engines for gpu, cell in engine_cells(plan.servers[index], node.index)}
    memory = node.host_memory.total_bytes
    yield f'<text class="bold" x="4" y="{y + 20}">node {node.index}</text>'
    said = f"{memory / 1e12:.2f} TB" if memory >= 1e12 else f"{memory / 1e9:.1f} GB"
    yield f'<text class="small" x="4" y="{y + 36}">{said} host</text>'
    for gpu in range(node.gpus):
        yield from _cell(ranks.get(gpu), serving.get(gpu), LEFT + gpu * (CELL + GAP), y)


def _cell(rank: TrainerRank | None, engine: tuple[int, int, int] | None, x: int, y: int) -> Iterator[str]:
    kind, hue = ("cell", HUES[rank.pp % len(HUES)]) if rank else ("empty", 0)
    yield f'<rect class="{kind}" style="--h:{hue}" x="{x}" y="{y}" width="{CELL}" height="{ROW}" rx="5"/>'
    if rank is not None:
        yield f'<text class="bold" x="{x + 7}" y="{y + 16}">rank {rank.rank}</text>'
        yield f'<text x="{x + CELL - 7}" y="{y + 16}" text-anchor="end">pp{rank.pp}</text>'
        dense, experts = f"tp{rank.tp} cp{rank.cp} dp{rank.dp}", f"ep{rank.ep} etp{rank.etp} edp{rank.edp}"
        yield f'<text class="small" x="{x + 7}" y="{y + 30}">{dense}</text>'
        yield f'<text class="small" x="{x + 7}" y="{y + 42}">{experts}</text>'
    if engine is not None:
        index, data, tensor = engine
        hue = HUES[(index + 5) % len(HUES)]
        yield f'<rect class="engine" style="--h:{hue}" x="{x + 1}" y="{y + 47}" width="4" height="13" rx="1"/>'
        yield f'<text class="small" x="{x + 9}" y="{y + 57}">engine {index}: dp{data} tp{tensor}</text>'
