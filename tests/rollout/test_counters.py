"""Cache hits and accepted drafts come from vLLM's own counters, over all engines, since the last rollout."""

import pytest

from vime.rollout.client import EngineError
from vime.rollout.counters import EngineCounters, increase, parse

PAGE = """# HELP vllm:prefix_cache_queries_total Prefix cache queries
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 100.0
vllm:prefix_cache_queries_total{engine="1",model_name="m"} 300.0
vllm:prefix_cache_queries_created{engine="0",model_name="m"} 1.7e+09
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 50.0
vllm:prefix_cache_hits_total{engine="1",model_name="m"} 1.5e+02
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} 40.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 30.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="0"} 20.0
"""


class Engine:
    """Answers with pages that were given, in turn."""

    def __init__(self, *pages):
        self.pages = list(pages)

    async def metrics(self):
        page = self.pages.pop(0)
        if isinstance(page, Exception):
            raise page
        return page


def page(queries, hits):
    return f"vllm:prefix_cache_queries_total {queries}\nvllm:prefix_cache_hits_total {hits}\n"


def test_counters_are_summed_over_labels_and_others_of_like_names_are_not_taken():
    assert parse(PAGE) == {"queries": 400, "hits": 200, "drafted": 40, "accepted": 30}


async def test_rates_are_of_the_time_since_the_last_call():
    counters = EngineCounters([Engine(page(100, 0), page(200, 90)), Engine(page(0, 0), page(300, 30))])
    assert await counters.take_rates() == {"perf/engine_cache_hit_rate": 0}
    assert await counters.take_rates() == {"perf/engine_cache_hit_rate": pytest.approx(120 / 400)}


async def test_what_an_engine_does_not_count_or_answer_is_missing():
    assert await EngineCounters([Engine("")]).take_rates() == {}
    assert await EngineCounters([Engine(EngineError("no answer"))]).take_rates() == {}
    both = EngineCounters([Engine(EngineError("no answer")), Engine(page(10, 5))])
    assert await both.take_rates() == {"perf/engine_cache_hit_rate": 0.5}


def test_a_restarted_engine_counts_from_zero():
    assert increase({"hits": 100}, {"hits": 7, "queries": 9}) == {"hits": 7, "queries": 9}
