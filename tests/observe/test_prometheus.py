"""The page for Prometheus, read back by Prometheus' own parser, and the dashboard that draws it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import vllm
import yaml
from prometheus_client.parser import text_string_to_metric_families

from vime.observe.page import CHARTS
from vime.observe.prometheus import metric_name, page, scrape_config
from vime.run.usage import GpuUsage, NodeUsage

ROOT = Path(__file__).parents[2]
ENGINE = """# HELP vllm:num_requests_running Number of requests.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="policy"} 3.0
# HELP vllm:e2e_request_latency_seconds Histogram.
# TYPE vllm:e2e_request_latency_seconds histogram
vllm:e2e_request_latency_seconds_bucket{le="0.5",model_name="policy"} 1.0
vllm:e2e_request_latency_seconds_bucket{le="+Inf",model_name="policy"} 2.0
vllm:e2e_request_latency_seconds_count{model_name="policy"} 2.0
vllm:e2e_request_latency_seconds_sum{model_name="policy"} 1.5
# TYPE up gauge
up 1.0
"""


def test_metrics_nodes_and_engines_are_one_page():
    usage = NodeUsage(1, 1.0, 2.5, 8, 10.0, 20.0, (GpuUsage(3, None, 5.0, 80.0, 60.0),))
    text = page(7, {"train/loss": 0.5, "eval/aime/pass@8": 0.25}, [usage], {0: ENGINE, 1: ENGINE})
    families = {family.name: family for family in text_string_to_metric_families(text)}
    samples = {(s.name, tuple(sorted(s.labels.items()))): s.value for f in families.values() for s in f.samples}
    assert samples["vime_rollout", ()] == 7
    assert samples["vime_train_loss", ()] == 0.5
    assert samples["vime_eval_aime_pass_8", ()] == 0.25
    assert samples["vime_gpu_memory_used_bytes", (("gpu", "3"), ("node", "1"))] == 5.0
    assert not any(name == "vime_gpu_busy_percent" for name, _ in samples)
    # A metric of several engines is one group of lines.
    assert families["vllm:e2e_request_latency_seconds"].type == "histogram"
    assert len(families["vllm:e2e_request_latency_seconds"].samples) == 8
    running = families["vllm:num_requests_running"].samples
    assert [(sample.labels["server"], sample.value) for sample in running] == [("0", 3.0), ("1", 3.0)]
    assert text.count("# TYPE up gauge") == 1


def test_the_scrape_file_names_the_key_and_does_not_hold_it():
    content = yaml.safe_load(scrape_config("127.0.0.1", 4321, "/run/secrets/metrics_key", {"run": "a: b"}))
    (job,) = content["scrape_configs"]
    assert job["authorization"] == {"credentials_file": "/run/secrets/metrics_key"}
    assert job["static_configs"] == [{"targets": ["127.0.0.1:4321"], "labels": {"run": "a: b"}}]


def test_the_dashboard_draws_metrics_that_there_are():
    board = json.loads((ROOT / "docs" / "grafana.json").read_text())
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    documented = (ROOT / "docs" / "report.md").read_text()
    known = {metric_name(name) for _, lines, _ in CHARTS for name, _ in lines}
    known |= {metric_name(name) for name in re.findall(r"`((?:rollout|train|perf)/[\w]+)`", documented)}
    known |= {metric_name(f"perf/{name}_time") for name in ("generate", "train", "sync", "save")}
    sources = "".join(path.read_text() for path in (Path(vllm.__file__).parent / "v1" / "metrics").glob("*.py"))
    text = page(1, {}, [NodeUsage(0, 1.0, 1.0, 1, 1.0, 1.0, (GpuUsage(0, 1.0, 1.0, 1.0, 1.0),))], {})
    known |= {family.name for family in text_string_to_metric_families(text)}
    for expression in expressions:
        for name in re.findall(r"\b(vime_\w+)\{", expression):
            assert name in known, name
        for name in re.findall(r"vllm:\w+", expression):
            assert f'"{name.removesuffix("_total")}"' in sources, name
