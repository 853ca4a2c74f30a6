"""A fake client of an engine that is asked only for log-probs, for the tests of trust."""

from vime.rollout.client import Generated


class FakeEngine:
    """Answers two tokens with fixed log-probs; `off` nats more on one data-parallel rank."""

    def __init__(self, version=3, off=0.0, wrong_rank=None):
        self.version, self.off, self.wrong_rank = version, off, wrong_rank
        self.asked = []

    async def generate(self, token_ids, settings, *, deadline_s, data_parallel_rank=None):
        self.asked.append((list(token_ids), data_parallel_rank, settings))
        off = self.off if data_parallel_rank == self.wrong_rank else 0.0
        return Generated([7, 8], [-0.5 - off, -1.0 - off], [self.version] * 2, "stop")
