"""Tests of the order of collectives: gradients of experts are reduced, and weights gathered, beside computation."""

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.forked import FORKED
from tests.support.specs import tiny_spec
from tests.train.jobs import build_trainer, rank_batches

LAYERS = 4


class EventLog(TorchDispatchMode):
    """Dispatch mode that appends the shape of each all-reduced tensor, and "gather" for each all-gather, to a list."""

    def __init__(self, events):
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "allreduce" in function._schema.name:
            self.events += [tuple(t.shape) for t in args[0]]
        elif "allgather" in function._schema.name:
            self.events.append("gather")
        return function(*args, **(kwargs or {}))


def record_events(connection, cluster, train):
    """Train a step of two micro-batches as rank 0 of a fake process group of two ranks, and send the step's events.

    The events are forwards and backwards, all-gathers of weights and all-reduces of gradients, in order.

    Args:
        connection: end of a pipe, to which the list of events is sent.
        cluster, train: keys that replace those of these sections of the spec.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    model = {**tiny_spec().model.model_dump(), "layers": LAYERS}
    model["moe"] = {"heads": 1, "experts": 3, "top_k": 2, "d_expert": 40, "every": 1, "kernel": "grouped"}
    spec = tiny_spec(
        model={**model, "d_ff": None},
        cluster={"workers": 2, "strategy": "fsdp", **cluster},
        train={"micro_batches": 4, **train},
    )
    trainer = build_trainer(spec)
    events = []
    backward = trainer.strategy.backward

    def backward_and_log(objective):
        events.append("backward starts")
        backward(objective)
        events.append("backward ends")

    trainer.strategy.backward = backward_and_log
    for number, block in enumerate(trainer.model.blocks):
        block.attention.register_forward_pre_hook(lambda *_, number=number: events.append(f"forward {number}"))
        block.attention.register_full_backward_pre_hook(lambda *_, number=number: events.append(f"attention {number}"))
    with EventLog(events):
        trainer.accumulate(rank_batches(spec, 0, trainer))
    connection.send(events)


@pytest.fixture(scope="module")
def events():
    return events_of_a_step({}, {})


def events_of_a_step(cluster, train):
    """Run `record_events` in a new process, and return the events that it sends."""
    receiver, sender = FORKED.Pipe(duplex=False)
    process = FORKED.Process(target=record_events, args=(sender, cluster, train))
    process.start()
    sender.close()
    received_events = receiver.recv()
    process.join()
    return received_events


def test_weights_of_a_block_are_gathered_before_the_block_before_it_computes(events):
    """There is one all-gather for each block, and one for the weights outside blocks."""
    forward = events[: events.index("backward starts")]
    gathers_before = [forward[: forward.index(f"forward {layer}")].count("gather") for layer in range(LAYERS)]
    assert gathers_before == [min(layer + 3, LAYERS + 1) for layer in range(LAYERS)]


def test_recomputed_blocks_are_gathered_once_in_a_backward():
    """Each block has two groups of weights: those of matrix products, and those of norms and router.

    The final norm is one more group, which is gathered when the backward starts. The other weights outside of blocks
    are still gathered then.
    """
    cluster, train = {"gather_precision": "bfloat16"}, {"precision": "bfloat16", "recompute": "block"}
    events = events_of_a_step(cluster, train)
    backward = events[events.index("backward starts") : events.index("backward ends")]
    assert backward.count("gather") == 2 * LAYERS + 1


def test_each_layer_is_reduced_during_the_last_backward_from_the_top_down(events):
    """The three matrices of a layer are reduced as soon as they are complete, before the backward of its attention."""
    first_end = events.index("backward ends")
    expert_shapes = [(3, 40, 32), (3, 40, 32), (3, 32, 40)]
    is_expert = [event in expert_shapes for event in events]
    assert not any(is_expert[:first_end])
    last_backward = events[first_end + 1 : len(events) - events[::-1].index("backward ends")]
    expert_events = [event for event in last_backward if event in expert_shapes or str(event).startswith("attention")]
    assert expert_events == [
        event for layer in reversed(range(LAYERS)) for event in (*expert_shapes, f"attention {layer}")
    ]
    assert sum(is_expert) == 3 * LAYERS
