"""The report of a run as one self-contained HTML page. Everything a model or a person wrote is escaped."""

from __future__ import annotations

import datetime
import shlex
from html import escape
from importlib.resources import files
from typing import Any

import yaml

from vime.observe.charts import Series, line_chart
from vime.observe.metrics import series
from vime.observe.summary import RunSummary
from vime.observe.timeline import Span

STYLE = files("vime.observe").joinpath("report.css").read_text(encoding="utf-8")

CHARTS = (
    ("Mean reward, all finished groups", (("rollout/raw_reward", "reward"),), ""),
    ("Response length", (("rollout/response_len_mean", "mean"), ("rollout/response_len_max", "max")), "tokens"),
    ("Policy loss", (("train/pg_loss", "policy loss"),), ""),
    ("KL and policy change", (("train/kl_loss", "KL loss"), ("train/ppo_kl", "KL to old policy")), "nat"),
    ("Entropy", (("train/entropy", "entropy"),), "nat"),
    ("Gradient norm", (("train/grad_norm", "norm"),), ""),
    ("Clipped share", (("train/pg_clipfrac", "share"),), ""),
    ("Trainer/engine log-prob difference", (("train/train_rollout_logprob_abs_diff", "mean difference"),), "nat"),
    ("Throughput", (("perf/rollout_tokens_per_second", "generated"),), "tokens/s"),
    (
        "Seconds a phase",
        tuple((f"perf/{p}_time", p) for p in ("generate", "train", "sync", "save")),
        "s",
    ),
)


def page(run: RunSummary) -> str:
    """The whole document."""
    sections = {
        "Outcome": _outcome(run),
        "Curves": _curves(run),
        "Evaluation": _evaluation(run),
        "Timeline": _timeline(run.spans),
        "Placement": _placement(run),
        "Preflight": _table(run.preflight),
        "Samples": _samples(run),
        "Checkpoints": _checkpoints(run),
        "Configuration": _configuration(run),
        "Events": _events(run.events),
    }
    present = {name: body for name, body in sections.items() if body}
    links = "".join(f'<a href="#{name.lower()}">{name}</a>' for name in present)
    body = "".join(f'<section id="{n.lower()}"><h2>{n}</h2>{b}</section>' for n, b in present.items())
    name = escape(run.plan.run_name)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{STYLE}</style></head><body><header><h1>{name}</h1>{_subtitle(run)}"
        f'<nav aria-label="Sections">{links}</nav></header><main>{body}</main></body></html>'
    )


def _subtitle(run: RunSummary) -> str:
    plan = run.plan
    ranks, engines = len(plan.trainer_ranks), len(plan.engines)
    return (
        f'<p class="dim">recipe {escape(plan.recipe.name)} on {len(plan.nodes)} nodes ({escape(plan.cluster.kind)}): '
        f"{ranks} trainer ranks, {engines} engines</p>"
    )


def _outcome(run: RunSummary) -> str:
    first, last = run.mean_reward(first=True), run.mean_reward(first=False)
    end = next((event for event in reversed(run.events) if event.get("kind") == "run-end"), None)
    cards = [("rollouts", f"{len(run.rewards)} of {run.plan.recipe.rollout.num_rollout}")]
    if first is not None and last is not None:
        cards += [("reward, first 5", f"{first:.3f}"), ("reward, last 5", f"{last:.3f}")]
    text = "".join(f'<div class="card"><span class="dim">{escape(k)}</span><b>{escape(v)}</b></div>' for k, v in cards)
    verdict = ""
    if end is not None:
        ok = end["data"].get("cause", "SUCCESS") == "SUCCESS"
        verdict = f'<p class="{"good" if ok else "bad"}">{escape(str(end["text"]))}</p>'
        tail = end["data"].get("log_tail")
        verdict += f"<pre>{escape(str(tail))}</pre>" if tail else ""
    return f'{verdict}<div class="cards">{text}</div>'


def _curves(run: RunSummary) -> str:
    charts = [
        line_chart(title, [Series(label, series(run.steps, name)) for name, label in lines], unit=unit)
        for title, lines, unit in CHARTS
    ]
    return f'<div class="grid2">{"".join(charts)}</div>' if any(charts) else ""


def _evaluation(run: RunSummary) -> str:
    names = sorted({name for values in run.steps.values() for name in values if name.startswith("eval/")})
    charts = [line_chart(name, [Series(name, series(run.steps, name))]) for name in names]
    return f'<div class="grid2">{"".join(charts)}</div>' if charts else ""


def _timeline(spans: list[Span], shown: int = 12) -> str:
    """The last rollouts' phases, a row a track."""
    if not spans:
        return ""
    newest = max(span.rollout_id for span in spans)
    spans = [span for span in spans if span.rollout_id > newest - shown]
    start, end = min(s.start for s in spans), max(s.end for s in spans)
    tracks = list(dict.fromkeys(span.track for span in spans))
    names = list(dict.fromkeys(span.name for span in spans))
    scale = 1000 / max(end - start, 1e-9)
    bars = "".join(
        f'<rect class="s{names.index(s.name) % 4}" x="{120 + (s.start - start) * scale:.1f}" '
        f'y="{6 + 26 * tracks.index(s.track)}" width="{max(s.seconds * scale, 0.5):.1f}" height="18">'
        f"<title>{escape(s.name)}, rollout {s.rollout_id}: {s.seconds:.2f} s</title></rect>"
        for s in spans
    )
    labels = "".join(f'<text x="0" y="{20 + 26 * i}">{escape(track)}</text>' for i, track in enumerate(tracks))
    keys = "".join(f'<span><i class="key s{i % 4}"></i>{escape(name)}</span>' for i, name in enumerate(names))
    height = 12 + 26 * len(tracks)
    return (
        f'<svg viewBox="0 0 1130 {height}" role="img" aria-label="Phases of the last rollouts, {end - start:.0f} s">'
        f'{labels}{bars}</svg><div class="legend">{keys}</div>'
    )


def _placement(run: RunSummary) -> str:
    rows = []
    for node in run.plan.nodes:
        ranks = [
            f"{r.rank} (gpu {r.gpu}, tp{r.tp} cp{r.cp} dp{r.dp} pp{r.pp})"
            for r in run.plan.trainer_ranks
            if r.node == node.index
        ]
        rows.append(
            {
                "node": node.index,
                "GPUs": node.gpus,
                "trainer ranks": ", ".join(ranks),
                "engines": ", ".join(map(str, node.engines)),
            }
        )
    return _table(rows)


def _samples(run: RunSummary) -> str:
    parts = []
    for rollout_id, samples in run.samples.items():
        rows = [{k: s.get(k) for k in ("reward", "label", "response", "prompt", "tokens", "status")} for s in samples]
        parts.append(
            f"<details><summary>rollout {rollout_id}</summary>{_table(rows, pre=('response', 'prompt'))}</details>"
        )
    return "".join(parts)


def _checkpoints(run: RunSummary) -> str:
    if not run.checkpoints:
        return ""
    items = "".join(f"<li><code>{escape(path)}</code></li>" for path in run.checkpoints)
    advice = "To go on from the newest, submit again under the same name, with the same flags after <code>--</code>:"
    return f"<ul>{items}</ul><p>{advice}</p><pre>{escape(resume_command(run))}</pre>"


def resume_command(run: RunSummary) -> str:
    """The command that continues this run from its newest checkpoint: the same submission again, by the run's name."""
    plan = run.plan
    words = ["python", "-m", "vime.submit", "--recipe", plan.recipe.name, "--nodes", str(len(plan.nodes))]
    words += ["--cluster", plan.cluster.name, "--run-name", plan.run_name]
    words += ["--base-dir", plan.base_dir] if plan.base_dir else []
    return shlex.join(words)


def _configuration(run: RunSummary) -> str:
    recipe = yaml.safe_dump(run.plan.recipe.model_dump(exclude_defaults=True), sort_keys=False, allow_unicode=True)
    notes = "".join(f"<li>{escape(note)}</li>" for note in run.plan.notes)
    return f"<ul>{notes}</ul><details><summary>recipe</summary><pre>{escape(recipe)}</pre></details>"


def _events(events: list[dict[str, Any]]) -> str:
    rows = [
        {
            "time": datetime.datetime.fromtimestamp(float(e["time"])).isoformat(" ", "seconds"),
            "event": e["kind"],
            "stage": e.get("stage"),
            "node": e.get("node"),
            "text": e.get("text"),
        }
        for e in events[-200:]
    ]
    return _table(rows)


def _table(rows: list[dict[str, Any]], pre: tuple[str, ...] = ()) -> str:
    if not rows:
        return ""
    heads = list(rows[0])
    head = "".join(f'<th scope="col">{escape(str(h))}</th>' for h in heads)

    def cell(name: str, value: Any) -> str:
        text = "" if value is None else escape(str(value))
        return f"<td><pre>{text}</pre></td>" if name in pre else f"<td>{text}</td>"

    body = "".join(f"<tr>{''.join(cell(h, row.get(h)) for h in heads)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
