"""Tests of the rule for the adaptive number of experts k, applied to tables of validation losses by step."""

import pytest

from mhmoe_ray.families.vision.adaptive import AdaptiveTopK
from mhmoe_ray.spec import AdaptiveSpec

SPEC = {"largest": 4, "interval": 2_000, "patience": 5_000}


def run_rule(rule_name, table, tasks=("det", "cls"), start=2, **spec):
    """Return k of each task after each row of a table of losses by step."""
    rule = AdaptiveTopK(AdaptiveSpec(rule=rule_name, **{**SPEC, **spec}), tasks, start)
    history = []
    for step, losses in table:
        rule.update(step, losses)
        history.append(tuple(rule.top_k[name] for name in tasks))
    return history


def one_task(*rows):
    return [(step, {"det": loss}) for step, loss in rows]


@pytest.mark.parametrize("rule_name", ["published", "coded"])
def test_k_stays_while_the_loss_improves(rule_name):
    table = one_task(*((2_000 * n, 10 - n / 10) for n in range(1, 30)))
    assert run_rule(rule_name, table, ["det"]) == [(2,)] * 29


# A loss stalls if it has not improved for more than 5,000 steps (`patience`). Here the best loss is at step 2,000, so
# the validation at step 8,000 is the first one that finds a stall.
RISE = one_task((2_000, 5.0), (4_000, 5.1), (6_000, 5.2), (8_000, 5.1))


@pytest.mark.parametrize("rule_name", ["published", "coded"])
def test_k_rises_after_more_than_the_patience_without_an_improvement(rule_name):
    assert run_rule(rule_name, RISE, ["det"]) == [(2,), (2,), (2,), (3,)]
    # If the validation is after exactly the patience, k does not rise.
    assert run_rule(rule_name, one_task((1_000, 5.0), (6_000, 5.0)), ["det"])[-1] == (2,)
    assert run_rule(rule_name, one_task((1_000, 5.0), (6_001, 5.0)), ["det"])[-1] == (3,)


@pytest.mark.parametrize("rule_name", ["published", "coded"])
def test_a_rise_that_does_not_help_is_taken_back_at_the_next_validation_and_ends_all_changes(rule_name):
    table = [*RISE, *one_task((10_000, 5.1), (12_000, 5.1), (30_000, 5.1), (40_000, 9.0))]
    assert run_rule(rule_name, table, ["det"])[3:] == [(3,), (2,), (2,), (2,), (2,)]


@pytest.mark.parametrize("rule_name", ["published", "coded"])
def test_a_rise_that_helps_stays_and_may_be_followed_by_another(rule_name):
    table = [*RISE, *one_task((10_000, 4.9), (12_000, 5.0), (14_000, 5.0), (16_000, 5.0), (18_000, 4.8))]
    assert run_rule(rule_name, table, ["det"])[3:] == [(3,), (3,), (3,), (3,), (4,), (4,)]


def test_the_first_step_counts_only_until_a_loss_is_below_the_first_loss():
    # All losses are above first_loss (100 by default), so the patience is counted from first_step (40,000).
    table = one_task((2_000, 120.0), (10_000, 110.0), (44_000, 105.0), (46_000, 101.0))
    assert run_rule("published", table, ["det"]) == [(2,), (2,), (2,), (3,)]
    assert run_rule("published", table, ["det"], first_step=0)[1] == (3,)


def two_tasks(*rows):
    return [(step, {"det": det, "cls": cls}) for step, det, cls in rows]


STALLED = two_tasks((2_000, 5.0, 3.0), (4_000, 5.0, 3.0), (6_000, 5.0, 3.0), (8_000, 5.0, 3.0), (10_000, 5.0, 3.0))


def test_as_published_tasks_decide_by_themselves():
    assert run_rule("published", STALLED) == [(2, 2), (2, 2), (2, 2), (3, 3), (2, 2)]
    # The raise of one task helps, and that of the other does not.
    table = [*STALLED[:4], *two_tasks((10_000, 4.0, 3.0), (12_000, 4.0, 3.0))]
    assert run_rule("published", table)[3:] == [(3, 3), (3, 2), (3, 2)]


def test_as_coded_tasks_share_the_memory_of_the_last_change_and_the_stop():
    # The first task raises its k, and the second takes the raise for its own, lowers its k and stops both.
    assert run_rule("coded", STALLED) == [(2, 2), (2, 2), (2, 2), (3, 1), (3, 1)]
    # An improvement of one task clears the memory for the other.
    table = [*STALLED[:3], *two_tasks((8_000, 5.0, 2.9), (10_000, 5.0, 2.8), (16_000, 5.0, 2.7))]
    assert run_rule("coded", table)[3:] == [(3, 2), (4, 2), (4, 2)]


def test_the_largest_k_is_taken_back_as_published_and_not_as_coded():
    # The loss never improves after the raise to the largest k.
    table = [*RISE, *one_task((10_000, 5.1))]
    assert run_rule("published", table, ["det"], largest=3)[3:] == [(3,), (2,)]
    assert run_rule("coded", table, ["det"], largest=3)[3:] == [(3,), (3,)]
    # At the largest k from the start, nothing can rise.
    assert run_rule("published", table, ["det"], largest=2)[3:] == [(2,), (2,)]


def test_a_restored_state_continues_as_if_nothing_had_happened():
    rule = AdaptiveTopK(AdaptiveSpec(**SPEC), ["det"], 2)
    for step, losses in RISE:
        changes = rule.update(step, losses)
    assert [(change.task, change.top_k) for change in changes] == [("det", 3)]
    restored = AdaptiveTopK(AdaptiveSpec(**SPEC), ["det"], 2)
    restored.load(rule.state.model_dump(mode="json"))
    assert restored.top_k == {"det": 3}
    assert restored.update(10_000, {"det": 5.1}) == rule.update(10_000, {"det": 5.1}) == [("det", 2)]
