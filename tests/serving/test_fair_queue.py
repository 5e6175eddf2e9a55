from collections import Counter

import pytest

from mhmoe_ray.serving.engine import Request, SamplingParams
from mhmoe_ray.serving.engine.block_pool import BlockPool, count_blocks
from mhmoe_ray.serving.engine.fair_queue import FairQueue
from mhmoe_ray.serving.engine.scheduler import PREFILL_CHUNK, Scheduler, Sequence

SEQ_LEN, MAX_RUNNING = 512, 16


def test_fair_queue_alternates_between_clients_with_equal_tokens():
    queue = FairQueue()
    for item in ("a1", "a2", "a3", "b1", "c1", "b2"):
        queue.add(item[0], item)
    assert len(queue) == 6
    assert queue.peek("a") == "a1"
    assert [queue.pop() for _ in range(6)] == ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert queue.peek("a") is None


def test_client_with_fewest_tokens_is_next():
    queue = FairQueue()
    for item in ("a1", "a2", "b1", "b2", "b3"):
        queue.add(item[0], item)
    order = []
    while len(queue):
        order.append(queue.pop())
        queue.turns.charge(order[-1][0], {"a": 10, "b": 4}[order[-1][0]])
    assert order == ["a1", "b1", "b2", "b3", "a2"]
    # A new client gets no credit for the time before it came.
    for item in ("c1", "c2", "a3"):
        queue.add(item[0], item)
    queue.turns.charge("c", 1)
    assert queue.pop() == "a3"


def test_removed_items_get_no_turn():
    queue = FairQueue()
    for item in ("a1", "a2", "b1"):
        queue.add(item[0], item)
    for item in ("a1", "a1", "c1", "b1"):  # neither a second a1 nor c1 is in the queue
        queue.remove(item[0], item)
    assert list(queue) == ["a2"]
    assert queue.pop() == "a2"
    assert not len(queue)


class Steps:
    """A scheduler whose steps are carried out without a model, and the tokens that each client got."""

    def __init__(self, cached_requests=MAX_RUNNING):
        pool = BlockPool((cached_requests + 1) * count_blocks(SEQ_LEN))
        self.scheduler, self.tokens = Scheduler(pool, MAX_RUNNING, 256, SEQ_LEN), Counter()

    def send(self, client, count, prompt_tokens, answer_tokens):
        for number in range(count):
            request = Request((number, len(client), *range(2, prompt_tokens)), SamplingParams(), client=client)
            self.scheduler.add(Sequence(request, answer_tokens, print))

    def run(self):
        """Carry out a step, and return the tokens of each client in it."""
        step_tokens = Counter()
        chunks = self.scheduler.schedule()
        assert len({chunk.sequence for chunk in chunks}) <= MAX_RUNNING
        for chunk in chunks:
            self.scheduler.record_computed(chunk)
            step_tokens[chunk.sequence.request.client] += chunk.length
            if chunk.is_last:
                chunk.sequence.token_ids.append(0)
                if chunk.sequence.answer_tokens == chunk.sequence.max_new_tokens:
                    self.scheduler.remove(chunk.sequence)
        self.tokens += step_tokens
        return step_tokens

    def clients(self, waiting=False):
        sequences = list(self.scheduler._waiting_queue) if waiting else self.scheduler.all_sequences()
        return {sequence.request.client for sequence in sequences}


@pytest.mark.parametrize("cached_requests", [1, MAX_RUNNING])
@pytest.mark.parametrize("short_requests", [(40, 20, 16), (40, 400, 2)])
def test_tokens_of_clients_that_wait_differ_by_at_most_one_request(short_requests, cached_requests):
    steps = Steps(cached_requests)
    steps.send("many", 30, 200, 100)
    steps.send("few", *short_requests)
    # In a small cache, a client whose next request has no room is charged a few tokens more than it gets.
    bound = SEQ_LEN + (cached_requests == 1) * PREFILL_CHUNK
    while steps.clients(waiting=True) == {"many", "few"}:
        steps.run()
        assert abs(steps.tokens["many"] - steps.tokens["few"]) <= bound
    assert min(steps.tokens.values()) > 2 * SEQ_LEN
    while steps.clients():
        assert steps.run(), "some request is computed in each step"
    request_count, prompt_tokens, answer_tokens = short_requests
    assert steps.tokens == {"many": 30 * 299, "few": request_count * (prompt_tokens + answer_tokens - 1)}


def test_client_with_few_short_requests_gets_them_as_if_alone():
    step_counts = []
    for request_count in (0, 50):
        steps = Steps()
        steps.send("many", request_count, 200, 200)
        for _ in range(100):
            steps.run()
        tokens_before, step_counts = steps.tokens["many"], [*step_counts, 0]
        steps.send("few", 5, 20, 16)
        while "few" in steps.clients():
            steps.run()
            step_counts[-1] += 1
    assert step_counts == [16, 16]
    # The other client pauses meanwhile.
    assert steps.tokens["many"] == tokens_before


def test_a_client_that_always_needs_few_tokens_slows_others_only_for_bursts():
    steps, token_counts = Steps(), []
    # Alone, it spends nothing of its burst.
    steps.send("few", 5, 20, 400)
    while steps.clients():
        steps.run()
    steps.send("many", 200, 100, 400)
    for _ in range(4000):
        if "few" not in steps.clients():
            steps.send("few", 1, 20, 400)
        token_counts.append(steps.run()["many"])
    slow_steps = [count <= 2 for count in token_counts]
    assert sum(slow_steps[:900]) > 850
    assert sum(slow_steps[2000:]) < 1200
