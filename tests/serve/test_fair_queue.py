from mhmoe_ray.serve.engine.scheduler import Turns


def test_clients_take_turns_each_in_its_own_order():
    turns = Turns()
    for one in ("a1", "a2", "a3", "b1", "c1", "b2"):
        turns.add(one[0], one)
    assert len(turns) == 6
    assert turns.first() == "a1"
    assert [turns.pop() for _ in range(6)] == ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert turns.first() is None


def test_one_that_leaves_is_nobodys_turn():
    turns = Turns()
    for one in ("a1", "a2", "b1"):
        turns.add(one[0], one)
    for one in ("a1", "a1", "c1", "b1"):  # the second time, and for the third, nobody is there
        turns.remove(one[0], one)
    assert list(turns) == ["a2"]
    assert turns.pop() == "a2"
    assert not len(turns)
