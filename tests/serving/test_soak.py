"""Test of a server during half an hour of clients that wait, stream, leave early, send nonsense, or exceed limits."""

import asyncio
import json
import os
import random
import time
from collections import Counter
from hashlib import sha256

import aiohttp
import httpx
import psutil
import pytest

from mhmoe_ray.serving.config import DEPLOYMENT, application_config
from mhmoe_ray.spec import KeySpec, ServeSpec

from .conftest import SEQ_LEN
from .deployed import application_details, deploy, start_ray_serve, wait_for_status

SECONDS = float(os.environ.get("SOAK_SECONDS", "1800"))
SEED = int(os.environ.get("SOAK_SEED", "1"))
CLIENTS = 24
FREE, LIMITED = ({"Authorization": f"Bearer {key}"} for key in ("free", "limited"))
SPEC = ServeSpec(
    max_tokens=40,
    max_concurrency=8,
    max_waiting=8,
    max_body_bytes=20_000,
    keys=(
        KeySpec(name="free", sha256=sha256(b"free").hexdigest()),
        KeySpec(name="limited", sha256=sha256(b"limited").hexdigest(), requests_per_minute=60, tokens_per_minute=3000),
    ),
)
NONSENSE = (
    b"",
    b"{",
    b"null",
    b"[]",
    b"\xff\xfe\x00",
    b'{"prompt": ' + b"[" * 3000 + b"]" * 3000 + b"}",
    b'{"prompt": "a", "max_tokens": 1e400}',
    b'{"prompt": "a", "max_tokens": "many"}',
    b'{"prompt": "a", "temperature": -1}',
    b'{"prompt": "a", "file": "/etc/passwd"}',
    b'{"prompt": [1, 999999]}',
    b'{"prompt": "a", "logit_bias": {"999": 1}}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "a", "best_of": 3}',
)


def request_body(seed: int, **fields) -> dict:
    """Return one of 40 request bodies, which `seed` modulo 40 chooses, with `fields` added or replaced."""
    variant = seed % 40
    return {
        "prompt": "the quick " * (variant % 4),
        "max_tokens": 1 + variant,
        "temperature": 1.0,
        "seed": variant,
        **fields,
    }


class Crowd:
    """Clients of several kinds, and how often each kind got each HTTP status."""

    def __init__(self, url: str) -> None:
        self.url, self.status_counts = url, Counter[tuple[str, int]]()
        self.expected: dict[int, str] = {}

    async def ask_until_answered(self, session, draws) -> None:
        """Retry a request until it is answered; equal requests must get equal answers."""
        seed = draws.randrange(40)
        while await self.ask(session, "patient", seed, FREE) == 429:
            await asyncio.sleep(0.2)

    async def ask_with_limited_key(self, session, draws) -> None:
        await self.ask(session, "limited", draws.randrange(40), LIMITED)

    async def ask(self, session, kind, seed, headers) -> int:
        """Send a request, check the response, and return its status; equal requests must get equal answers."""
        async with session.post(self.url, json=request_body(seed), headers=headers) as answer:
            self.status_counts[kind, answer.status] += 1
            if answer.status == 200:
                text = (await answer.json())["choices"][0]["text"]
                assert self.expected.setdefault(seed, text) == text
            else:
                assert (await answer.json())["error"]["message"]
                assert answer.headers["Retry-After"]
            return answer.status

    async def read_stream(self, session, draws) -> None:
        """Read a complete streamed answer, sometimes slowly."""
        seed, is_slow = draws.randrange(40), draws.random() < 0.2
        async with session.post(self.url, json=request_body(seed, stream=True), headers=FREE) as answer:
            self.status_counts["streaming", answer.status] += 1
            if answer.status != 200:
                return
            events = []
            async for line in answer.content:
                if line.startswith(b"data: "):
                    events.append(line.removeprefix(b"data: ").strip())
                    await asyncio.sleep(0.05 * is_slow)
            assert events[-1] == b"[DONE]"
            text = "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])
            assert self.expected.setdefault(seed, text) == text

    async def leave_early(self, session, draws) -> None:
        """Disconnect before the answer or in the middle of it."""
        try:
            async with asyncio.timeout(draws.choice([0.001, 0.02, 0.1])):
                fields = request_body(39, stream=draws.random() < 0.5)
                async with session.post(self.url, json=fields, headers=FREE) as answer:
                    self.status_counts["leaving", answer.status] += 1
                    await answer.content.readany()
        except TimeoutError:
            # This client left before the answer began, so it saw no status.
            self.status_counts["left", 0] += 1

    async def send_nonsense(self, session, draws) -> None:
        content = draws.choice([*NONSENSE, draws.randbytes(draws.randrange(200))])
        headers = {**FREE, "Content-Type": draws.choice(["application/json", "application/json", "text/plain"])}
        async with session.post(self.url, data=content, headers=headers) as answer:
            self.status_counts["nonsense", answer.status] += 1
            assert (await answer.json())["error"]["message"]

    async def exceed_a_limit(self, session, draws) -> None:
        """Send a request that exceeds one of the limits, or has a wrong model or key."""
        kind, fields, headers = draws.choice(
            [
                ("body", {"prompt": "x" * 30_000}, FREE),
                ("prompt", {"prompt": "z" * 2 * SEQ_LEN}, FREE),
                ("tokens", {"prompt": "a", "max_tokens": 41}, FREE),
                ("choices", {"prompt": "a", "n": 129}, FREE),
                ("model", {"prompt": "a", "model": "gpt"}, FREE),
                ("key", {"prompt": "a"}, {"Authorization": "Bearer guessed"}),
            ]
        )
        async with session.post(self.url, json=fields, headers=headers) as answer:
            self.status_counts[kind, answer.status] += 1
            assert (await answer.json())["error"]["message"]

    async def run(self, seconds: float, sample_memory) -> None:
        """Let `CLIENTS` clients send requests of random kinds for some seconds; call `sample_memory` at intervals."""
        kinds = [self.ask_until_answered] * 4 + [self.read_stream] * 3 + [self.leave_early] * 2
        kinds += [self.send_nonsense, self.exceed_a_limit, self.ask_with_limited_key]
        deadline = time.monotonic() + seconds

        async def client(number: int) -> None:
            draws = random.Random(f"{SEED} {number}")
            while time.monotonic() < deadline:
                await draws.choice(kinds)(session, draws)

        async def watch() -> None:
            while time.monotonic() < deadline:
                sample_memory()
                await asyncio.sleep(min(60, seconds / 10))

        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:
            await asyncio.gather(watch(), *(client(number) for number in range(CLIENTS)))


EXPECTED = {
    "patient": {200, 429},
    "streaming": {200, 429},
    "leaving": {200, 429},
    "left": {0},
    "limited": {200, 429},
    "nonsense": {400},
    "body": {413},
    "prompt": {400},
    "tokens": {400},
    "choices": {400},
    "model": {404},
    "key": {401},
}


@pytest.mark.ray
@pytest.mark.soak
def test_mixed_clients_get_expected_statuses_and_memory_stays_constant(checkpoint):
    memory: list[int] = []
    with start_ray_serve() as port:
        deploy([application_config("tiny", checkpoint, SPEC, "tiny-abc123")])
        wait_for_status("tiny", "RUNNING")
        [replica] = application_details("tiny")["deployments"][DEPLOYMENT]["replicas"]
        process = psutil.Process(replica["pid"])
        crowd = Crowd(f"http://127.0.0.1:{port}/v1/completions")

        def sample_memory() -> None:
            memory.append(process.memory_info().rss)
            request_count = sum(crowd.status_counts.values())
            print(f"{request_count} requests, {memory[-1] / 2**20:.1f} MiB", flush=True)

        asyncio.run(crowd.run(SECONDS, sample_memory))
        sample_memory()
        assert process.is_running()
        time.sleep(5)  # meanwhile the engine ends the requests of clients that left
        response = httpx.get(f"http://127.0.0.1:{port}/stats", headers=FREE, timeout=30).json()
    [stats] = response["replicas"]
    print(dict(sorted(crowd.status_counts.items())))
    statuses_by_kind: dict[str, set[int]] = {}
    for kind, status in crowd.status_counts:
        statuses_by_kind.setdefault(kind, set()).add(status)
    assert all(statuses <= EXPECTED[kind] for kind, statuses in statuses_by_kind.items()), statuses_by_kind
    assert statuses_by_kind.keys() == EXPECTED.keys(), "each kind of client has sent requests"
    assert {429, 200} == statuses_by_kind["limited"]
    assert (stats["running"], stats["waiting"], stats["cache_used"]) == (0, 0, 0)
    settled_memory = memory[len(memory) // 5 :]
    assert max(settled_memory) <= 1.05 * min(settled_memory), [f"{rss / 2**20:.1f}" for rss in memory]
