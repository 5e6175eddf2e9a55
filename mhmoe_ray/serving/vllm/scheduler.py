"""vLLM's schedulers with turns between clients by tokens, as in `serving/engine/scheduler.py`."""

from collections import defaultdict, deque
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from mhmoe_ray.serving.engine.fair_queue import TokenTurns

PAUSED_FACTOR = 2
"""vLLM's `max_num_seqs` is this factor times the number of requests in a step, because paused requests count too."""


class FairScheduler(Scheduler):
    """Scheduler that hides the requests that have to pause from vLLM's own."""

    running: list[Request]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._turns = TokenTurns(self.max_model_len)

    def add_request(self, request: Request) -> None:
        self._turns.enter(_client(request))
        super().add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        chosen_requests = self._choose_requests()
        paused_requests = [request for request in self.running if request not in chosen_requests]
        waiting_requests = [request for request in self.waiting if request not in chosen_requests]
        self.running = [request for request in self.running if request in chosen_requests]
        self.waiting.remove_requests(waiting_requests)
        output = super().schedule(*args, **kwargs)
        # Paused requests keep their blocks and, as vLLM's model runner allows, are missing in this step only.
        self.running += paused_requests
        for request in waiting_requests:
            self.waiting.add_request(request)
        return output

    def _choose_requests(self) -> set[Request]:
        """Return the running and waiting requests of the next step."""
        chosen_requests = set[Request]()
        budget = self.max_num_scheduled_tokens
        pending: defaultdict[str, deque[Request]] = defaultdict(deque)
        for request in [*sorted(self.running, key=lambda r: not r.num_output_tokens), *self.waiting]:
            pending[_client(request)].append(request)

        def take(client: str) -> int:
            nonlocal budget
            if not pending[client] or not budget or len(chosen_requests) * PAUSED_FACTOR >= self.max_num_running_reqs:
                return 0
            request = pending[client].popleft()
            chosen_requests.add(request)
            tokens = max(1, min(request.num_tokens - request.num_computed_tokens, budget))
            budget -= tokens
            return int(tokens)

        self._turns.share_step(list(pending), take, lambda client: bool(pending[client]))
        return chosen_requests


class FairAsyncScheduler(FairScheduler, AsyncScheduler):
    """The same for vLLM's asynchronous scheduler."""


SCHEDULERS = {Scheduler: FairScheduler, AsyncScheduler: FairAsyncScheduler}
"""Our scheduler in place of each of vLLM's."""


def _client(request: Request) -> str:
    extra_args = (request.sampling_params and request.sampling_params.extra_args) or {}
    return str(extra_args.get("client", ""))
