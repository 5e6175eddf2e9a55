from mhmoe_ray.serving.engine.fair_queue import FairQueue


def test_fair_queue_alternates_between_clients():
    queue = FairQueue()
    for item in ("a1", "a2", "a3", "b1", "c1", "b2"):
        queue.add(item[0], item)
    assert len(queue) == 6
    assert queue.peek() == "a1"
    assert [queue.pop() for _ in range(6)] == ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert queue.peek() is None


def test_removed_items_get_no_turn():
    queue = FairQueue()
    for item in ("a1", "a2", "b1"):
        queue.add(item[0], item)
    for item in ("a1", "a1", "c1", "b1"):  # neither a second a1 nor c1 is in the queue
        queue.remove(item[0], item)
    assert list(queue) == ["a2"]
    assert queue.pop() == "a2"
    assert not len(queue)
