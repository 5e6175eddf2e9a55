"""Tests of the parts of Ray 2.60 that train/resilience.py relies on; tests/several_nodes runs it on real clusters."""

import errno
import inspect
import os
import pickle

import pytest
from ray.train import FailureConfig, ScalingConfig
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import FailureDecision, create_failure_policy
from ray.train.v2._internal.execution.preemption import PreemptionContext
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision
from ray.train.v2._internal.execution.worker_group.poll import WorkerGroupPollStatus, WorkerStatus
from ray.train.v2._internal.execution.worker_group.state import WorkerGroupState
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from mhmoe_ray.errors import CheckpointError, JobError, MhmoeError, StorageError
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.storage import location
from mhmoe_ray.train import placement, resilience
from mhmoe_ray.train.preemption import PreemptedError
from mhmoe_ray.train.resilience import DivisorScalingPolicy, NonRetryableFailurePolicy, RunTrainer, package_error
from tests.support.events import record
from tests.support.specs import tiny_spec


def test_policy_overrides_existing_methods():
    overridden_names = {name for name in vars(DivisorScalingPolicy) if callable(getattr(DivisorScalingPolicy, name))}
    assert overridden_names <= set(vars(ElasticScalingPolicy))
    policy = ElasticScalingPolicy(ScalingConfig(num_workers=(2, 4), resources_per_worker={"CPU": 2.0}))
    assert policy._count_possible_workers({"a": {"CPU": 5.0}, "b": {"CPU": 2.0}}) == 3
    assert policy.scaling_config._resources_per_worker_not_none["CPU"] == 2.0


def test_ray_creates_policies_and_controller_in_fit():
    assert "_initialize_and_run_controller" in vars(RunTrainer)
    assert "scaling_policy=create_scaling_policy" in inspect.getsource(DataParallelTrainer.fit)
    assert "failure_policy=create_failure_policy" in inspect.getsource(DataParallelTrainer.fit)
    assert "_initialize_and_run_controller(" in inspect.getsource(DataParallelTrainer.fit)
    assert "scaling_policy" in inspect.signature(TrainController.__init__).parameters


# The ignored warnings of Ray are about its own defaults.
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")
def test_placement_group_cleaner_is_left_out(tmp_path):
    trainer = RunTrainer(RunDir(tmp_path), tiny_spec(tmp_path), scaling_config=ScalingConfig(num_workers=2))
    our_callbacks, ray_callbacks = (
        {type(c) for c in create_callbacks()}
        for create_callbacks in (
            trainer._create_default_callbacks,
            super(RunTrainer, trainer)._create_default_callbacks,
        )
    )
    assert ray_callbacks - our_callbacks == {PlacementGroupCleanerCallback}


def test_scaling_policy_can_be_pickled(tmp_path):
    spec = tiny_spec(cluster={"workers": {"min": 1, "max": 4}})
    policy = DivisorScalingPolicy(ScalingConfig(num_workers=(1, 4)), RunDir(tmp_path), spec)
    assert pickle.loads(pickle.dumps(policy))._worker_counts == [1, 2, 4]


@pytest.mark.parametrize(
    ("raised", "decision"),
    [(PreemptedError(), FailureDecision.RETRY), (RuntimeError("anything else"), FailureDecision.RAISE)],
)
def test_ray_retries_preempted_ranks_only(raised, decision):
    policy = create_failure_policy(FailureConfig(max_failures=0, max_preemption_failures=-1))
    failure = WorkerGroupError("", {0: RuntimeError("of another rank"), 1: pickle.loads(pickle.dumps(raised))})
    assert policy.make_decision(failure) is decision


@pytest.mark.parametrize(
    ("raised", "decision"),
    [
        (JobError("training", "it is not finite", "lower it"), FailureDecision.RAISE),
        (CheckpointError("checkpoint", "rank 0 cannot write it: Input/output error", "try"), FailureDecision.RETRY),
        (CheckpointError("checkpoint", "rank 0: No space left on device", "make room"), FailureDecision.RAISE),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/runs/metrics.jsonl"), FailureDecision.RAISE),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), FailureDecision.RAISE),
        (StorageError("file", "it cannot be written", "repair the storage"), FailureDecision.RETRY),
        (RuntimeError("connection closed by peer"), FailureDecision.RETRY),
    ],
)
def test_errors_of_this_package_are_not_retried(tmp_path, raised, decision):
    policy = NonRetryableFailurePolicy(FailureConfig(max_failures=3), RunDir(tmp_path), tiny_spec())
    failure = WorkerGroupError("", {0: RuntimeError("of another rank"), 1: raised})
    assert policy.make_decision(pickle.loads(pickle.dumps(failure))) is decision
    assert (package_error(failure) is not None) == isinstance(raised, MhmoeError)


def test_retry_waits_until_run_directory_can_be_read(tmp_path, monkeypatch, capsys):
    """Each new worker group reads the run directory, so an outage of a minute would use up all retries otherwise."""
    run = RunDir(tmp_path)
    run.spec_file.mkdir()  # a folder cannot be read as a file
    monkeypatch.setattr(resilience, "STORAGE_CHECK_SECONDS", 0.01)
    sleep_actions = iter([lambda _: None, lambda _: run.spec_file.rmdir()])
    monkeypatch.setattr(resilience.time, "sleep", lambda seconds: next(sleep_actions)(seconds))
    failure = WorkerGroupError("", {0: StorageError("file", "it cannot be written", "repair the storage")})
    assert (
        NonRetryableFailurePolicy(FailureConfig(max_failures=3), run, tiny_spec()).make_decision(failure)
        is FailureDecision.RETRY
    )
    assert capsys.readouterr().out.count("the workers start again when the run directory can be read") == 2


@pytest.mark.long
def test_storage_failure_does_not_end_elastic_run(tmp_path, monkeypatch):
    policy = DivisorScalingPolicy(
        ScalingConfig(num_workers=(1, 4)), RunDir(tmp_path), tiny_spec(cluster={"workers": {"min": 1, "max": 4}})
    )
    monkeypatch.setattr(policy, "_maybe_send_resource_request", lambda: None)  # there is no cluster
    unreachable = "s3://bucket/run?scheme=http&region=us-east-1&endpoint_override=127.0.0.1:9"
    policy._run = RunDir(location(unreachable))
    group = WorkerGroupState(0.0, None, [None], None)
    assert isinstance(policy.make_decision_for_running_worker_group(group, None), NoopDecision)


def test_workers_without_resources_are_retried_and_recorded_as_waiting(tmp_path, monkeypatch):
    run = RunDir(tmp_path)
    monkeypatch.setattr(resilience, "missing_resources", lambda spec: "it needs a GPU")  # there is no cluster to ask
    events.record(run, "prepared")
    policy = NonRetryableFailurePolicy(FailureConfig(max_failures=0), run, tiny_spec())
    for _ in range(3):
        assert policy.make_decision(ControllerError(WorkerGroupStartupTimeoutError(2))) is FailureDecision.RETRY
    assert [(e["event"], e.get("missing")) for e in events.read(run)] == [
        ("prepared", None),
        ("waiting", "it needs a GPU"),
    ]
    record(run, "started")
    assert events.state(events.read(run)) == "running"
    policy.make_decision(ControllerError(WorkerGroupStartupTimeoutError(2)))
    assert events.state(events.read(run)) == "waiting"


def test_ray_reports_the_exception_that_was_raised():
    failure = UserExceptionWithTraceback(JobError("training", "it is not finite", "lower it"), "traceback")
    status = WorkerGroupPollStatus({0: WorkerStatus(running=False, error=failure)})
    assert package_error(status.get_worker_group_error()) is failure._base_exc


def test_preemption_context_has_preemption_info():
    assert PreemptionContext().preemption_info is None


@pytest.mark.parametrize(
    ("held_workers", "free_cpus", "count"),
    [
        (0, 4.0, 2),  # four workers would take the CPU of the data stream
        (0, 5.0, 4),
        (0, 1.0, 0),
        (2, 2.0, 4),  # the stream of a running worker group has its CPU, which is not free
        (None, 0.0, 4),  # the last worker group may still hold what is not free
    ],
)
def test_a_start_leaves_a_free_cpu_for_the_data_stream(tmp_path, monkeypatch, held_workers, free_cpus, count):
    """The only node has eight CPUs; workers of this run or other jobs hold those that are not free."""
    spec = tiny_spec(cluster={"workers": {"min": 2, "max": 8}}, train={"micro_batches": 8})
    policy = DivisorScalingPolicy(
        ScalingConfig(num_workers=(2, 8), resources_per_worker={"CPU": 1}), RunDir(tmp_path), spec
    )
    # There is no cluster here, so these functions give the answers that a cluster would give.
    monkeypatch.setattr(placement.state, "get_draining_nodes", dict)
    monkeypatch.setattr(resilience.ray, "nodes", lambda: [{"NodeID": "n", "Alive": True, "Resources": {"CPU": 8.0}}])
    monkeypatch.setattr(resilience, "available_resources_per_node", lambda: {"n": {"CPU": free_cpus}})
    policy._held_workers = held_workers
    assert policy._count_possible_workers(None) == count
