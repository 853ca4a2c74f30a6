"""A run's live numbers in Prometheus' text format: its metrics, its nodes, and its engines' own pages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from vime.run.usage import NodeUsage

_HEADER = re.compile(r"# (HELP|TYPE) (\S+) ?(.*)")
_SAMPLE = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (.+)")


@dataclass
class Family:
    """One metric with all its samples."""

    kind: str = "untyped"
    about: str = ""
    samples: list[str] = field(default_factory=list)

    def lines(self, name: str) -> Iterable[str]:
        if self.about:
            yield f"# HELP {name} {self.about}"
        yield f"# TYPE {name} {self.kind}"
        yield from self.samples


def metric_name(name: str) -> str:
    """Prometheus' name of a metric of the run: `eval/aime/pass@8` is `vime_eval_aime_pass_8`."""
    return "vime_" + re.sub(r"\W+", "_", name)


def page(rollout: int, values: Mapping[str, float], nodes: Sequence[NodeUsage], engines: Mapping[int, str]) -> str:
    """The whole page. `values`: newest metrics by name; `engines`: pages of those that answered, by engine."""
    families: dict[str, Family] = {}
    if rollout >= 0:
        _gauge(families, "vime_rollout", {}, float(rollout))
    for name, value in sorted(values.items()):
        _gauge(families, metric_name(name), {}, value)
    for usage in nodes:
        node = {"node": str(usage.node)}
        _gauge(families, "vime_node_load", node, usage.load)
        _gauge(families, "vime_node_memory_used_bytes", node, usage.memory_used)
        _gauge(families, "vime_node_memory_total_bytes", node, usage.memory_total)
        for gpu in usage.gpus:
            at = {**node, "gpu": str(gpu.index)}
            _gauge(families, "vime_gpu_busy_percent", at, gpu.percent)
            _gauge(families, "vime_gpu_memory_used_bytes", at, gpu.memory_used)
            _gauge(families, "vime_gpu_celsius", at, gpu.celsius)
    for number, text in engines.items():
        _merge(families, text, number)
    return "\n".join([*(line for name, family in families.items() for line in family.lines(name)), ""])


def scrape_config(address: str, port: int, key_file: str, labels: Mapping[str, str]) -> str:
    """Configuration that makes a Prometheus on this node read the page."""
    job: dict[str, Any] = {
        "job_name": "vime",
        "authorization": {"credentials_file": key_file},
        "static_configs": [{"targets": [f"{address}:{port}"], "labels": dict(labels)}],
    }
    return yaml.safe_dump({"scrape_configs": [job]}, sort_keys=False)


def _gauge(families: dict[str, Family], name: str, labels: Mapping[str, str], value: float | None) -> None:
    if value is not None:
        text = ",".join(f'{key}="{each}"' for key, each in labels.items())
        family = families.setdefault(name, Family("gauge"))
        family.samples.append(f"{name}{{{text}}} {value!r}" if text else f"{name} {value!r}")


def _merge(families: dict[str, Family], text: str, engine: int) -> None:
    """Add an engine's page, its number as the label `server`, since vLLM numbers data-parallel ranks as `engine`.

    The format allows one group of lines per metric.
    """
    current = Family()
    for line in text.splitlines():
        if header := _HEADER.fullmatch(line):
            current = families.setdefault(header[2], Family())
            if header[1] == "TYPE":
                current.kind = header[3]
            else:
                current.about = header[3]
        elif sample := _SAMPLE.fullmatch(line):
            labels = f'server="{engine}"' + (f",{sample[2]}" if sample[2] else "")
            current.samples.append(f"{sample[1]}{{{labels}}} {sample[3]}")
