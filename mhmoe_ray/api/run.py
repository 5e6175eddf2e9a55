"""Runs: submit one or find it; then watch, stop, resume, evaluate, export or remove it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mhmoe_ray.api import attempts
from mhmoe_ray.api.checkpoints import Checkpoint, CheckpointName, list_checkpoints, path_text, pick_checkpoint
from mhmoe_ray.api.connection import check_training
from mhmoe_ray.api.defaults import OnNote, Prior, ignore_note
from mhmoe_ray.api.evaluation import EvaluationOptions, Texts, evaluate
from mhmoe_ray.api.logs import log_lines
from mhmoe_ray.api.spec import Overrides, override_list, require_spec
from mhmoe_ray.api.trust import require_submitted_settings
from mhmoe_ray.checkpoint.huggingface.config import ExportResult
from mhmoe_ray.cluster.connect import require_known
from mhmoe_ray.cluster.runs import run_status, state_of
from mhmoe_ray.errors import RunError, SpecError
from mhmoe_ray.evaluate.request import Evaluation
from mhmoe_ray.runs import directory as run_directory
from mhmoe_ray.runs import events, history
from mhmoe_ray.runs.directory import RunDir, last_attempt
from mhmoe_ray.spec import RunSpec, apply_overrides, load_resolved_spec, parse_overrides, validate_section
from mhmoe_ray.spec.train import PROFILED_STEPS
from mhmoe_ray.storage import Location, default_storage, location
from mhmoe_ray.terminal import Activity, without_colours

if TYPE_CHECKING:
    from mhmoe_ray.data.documents import DocumentRead, StepDocument
    from mhmoe_ray.train.repetition import ResumeCheck


def submit(spec: RunSpec, address: str | None = None, on_note: OnNote = ignore_note) -> "Run":
    """Start a run of a spec on a cluster, without waiting for it, and return it.

    Without an address and a default cluster, a Ray cluster is started on this machine. The job prepares missing data
    first.

    Args:
        spec: spec of the run (`load_spec`).
        address: a Ray cluster: the URL of its dashboard, or its name; None for the default cluster.
        on_note: callback that gets lines of text about the progress.

    Raises:
        DataError: text is missing, or the prepared data does not fit the spec.
        ClusterError: the cluster cannot be started or reached, or can never hold the run.
        SpecError: `spec` is not a loaded spec, the nodes cannot be expected to see the run's storage and data, or the
            storage cannot be written.
        JobError: the cluster does not accept the job.
    """
    require_spec(spec)
    check_training(spec)
    return Run(attempts.start_run(spec, address, on_note))


def find_run(name: "Run | str | PathLike[str] | None" = None, storage: str | PathLike[str] | None = None) -> "Run":
    """Return a run by its id, the start of its id, or its path; without a name, the newest run.

    Args:
        name: id, start of an id, or path; or a `Run`, which is returned; None for the newest run that was not imported.
        storage: folder that holds run directories, a path or s3://, gs://; by default MHMOE_STORAGE, else `runs`.

    Raises:
        RunError: there is no such run, or the name fits several.
        StorageError: the storage cannot be read.
    """
    return Run(run_directory.find_run(None if name is None else path_text(name), _storage(storage), with_job=True))


def list_runs(storage: str | PathLike[str] | None = None) -> list["Run"]:
    """Return all runs of a storage folder, oldest first.

    Args:
        storage: folder that holds run directories, a path or s3://, gs://; by default MHMOE_STORAGE, else `runs`.

    Raises:
        StorageError: the storage cannot be read.
    """
    return [Run(run_dir) for run_dir in run_directory.list_runs(_storage(storage))]


def _storage(storage: str | PathLike[str] | None) -> Location:
    return location(default_storage() if storage is None else path_text(storage))


@dataclass(frozen=True, repr=False)
class Run:
    """Handle of a run. Everything about the run is in its directory, so several processes may have handles of it.

    A run can be given wherever a path is expected, and then means its directory. After the run is removed, everything
    that reads or changes it raises a RunError.
    """

    directory: RunDir

    def __repr__(self) -> str:
        return f"Run({self.id!r})"

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def id(self) -> str:
        """Name of the run directory: the name in the spec and a suffix that makes it unique."""
        return self.directory.id

    @property
    def path(self) -> Location:
        """Path of the run directory."""
        return self.directory.path

    @property
    def _existing_directory(self) -> RunDir:
        """The run directory, after checking that the run was not removed; a RunError says that it was."""
        self.directory.require_existing()
        return self.directory

    @property
    def spec(self) -> RunSpec:
        """Complete spec of the run.

        Raises:
            RunError: the run was imported, so it has no spec.
        """
        directory = self._existing_directory
        if directory.is_imported:
            reason = "it was imported, not trained here, so it has no spec"
            raise RunError(f"run {self.id}", reason, "see `mhmoe_ray.load(run).spec` for its model")
        return directory.spec()

    @property
    def state(self) -> str:
        """State of the run: submitted, preparing, waiting, running, finished, stopped, failed, imported or unknown.

        Unless the run is over, its cluster is asked; the state is unknown if the cluster does not answer.
        """
        directory = self._existing_directory
        return state_of(directory, events.read(directory))[0]

    def status(self) -> dict[str, Any]:
        """Return the state, progress and quality of the run as `mhmoe status --json` prints them."""
        return run_status(self._existing_directory)

    def metrics(self) -> list[dict[str, Any]]:
        """Return the metrics of each step so far, one dictionary per step. The run may still be training.

        They are read from metrics.jsonl; a repeated step has only its newest metrics. The README of the Python
        interface has a table of the keys, such as `step`, `loss` and `val_loss`.
        """
        return history.read(self._existing_directory)

    def checkpoints(self) -> list[Checkpoint]:
        """Return the checkpoints of the run, oldest first. Their files are verified when they are used."""
        return list_checkpoints(self._existing_directory)

    def logs(self, rank: int | None = None, *, follow: bool = False, on_note: OnNote = ignore_note) -> Iterator[str]:
        """Return the log lines of the run's newest attempt: those of all workers, or those of one worker by its rank.

        If the cluster is gone, they come from the copy in the run directory.

        Args:
            rank: rank of the worker; None for the whole job.
            follow: whether to continue with new lines until the run ends. If another process gets the rank, its lines
                follow.
            on_note: callback that gets a line of text about where the lines come from.

        Raises:
            RunError: the run was imported; or no workers have started yet, or there is no such rank.
            ClusterError, JobError: the lines are neither on the cluster nor in the run directory.
            TokenError: the cluster asks for another token.
        """
        return map(without_colours, log_lines(self._existing_directory, rank, follow=follow, on_note=on_note))

    def wait(
        self,
        timeout: float | None = None,
        on_event: Callable[[dict[str, Any]], object] | None = None,
        on_note: OnNote = ignore_note,
    ) -> str:
        """Wait until the run is over, and return its state: finished, stopped or imported.

        Ctrl-C ends the wait, not the run.

        Args:
            timeout: timeout in seconds; None to wait without a limit.
            on_event: callback that gets each event of the newest attempt, from its submission on. The README of the
                Python interface has a table of the kinds, which the key `event` has.
            on_note: callback that gets a line of text if the cluster or the storage does not answer for now.

        Raises:
            JobError: the run failed; the message has the reason.
            TimeoutError: the run is not over when the timeout ends.
            ClusterError, StorageError: the cluster or the storage has not answered for a while.
        """
        directory = self._existing_directory
        attempt_events = attempts.AttemptEvents(directory, on_event)
        outcome = attempts.wait_for_outcome(
            directory,
            attempt_events.read,
            on_poll=attempt_events.report,
            timeout=timeout,
            on_note=on_note,
        )
        # The run may have recorded further events between the last read and its end.
        attempt_events.read()
        attempt_events.report()
        if outcome.state == "failed":
            raise attempts.failure_error(directory, outcome)
        return outcome.state

    def documents_at(self, step: int, rank: int | None = None) -> "list[StepDocument]":
        """Return the documents that a step read, in their order, each with its place, text and weight.

        Args:
            step: one of the run's steps, from 1.
            rank: rank of a worker; None for all.

        Raises:
            RunError: the run has not done this step, or not with this rank, or was imported.
            DataError: the prepared data are gone or changed.
        """
        # This import, like that of `find_document`, is delayed, because the module imports pyarrow.
        from mhmoe_ray.api.documents import documents_at

        return documents_at(self._existing_directory, step, rank)

    def find_document(
        self, file: str | PathLike[str], line: int | None = None, on_note: OnNote = ignore_note
    ) -> "list[DocumentRead]":
        """Return at which steps a document was read, also by the runs that this run started from.

        Args:
            file: path or URI of a raw file, or the end of it.
            line: a line of the document, its row in a table, or its number in a tar file; None for the whole file.
            on_note: callback that gets a line of text about each earlier run that is gone.

        Raises:
            RunError: the run was imported.
            DataError: the prepared data are gone or changed, have no index, or do not have this document.
        """
        from mhmoe_ray.api.documents import find_document

        return find_document(self._existing_directory, path_text(file), line, on_note)

    def profile(self, steps: int = PROFILED_STEPS, on_note: OnNote = ignore_note) -> dict[str, Any]:
        """Profile the next steps of the run while it trains, or return its newest profile if it has ended.

        The profile has traces of torch's profiler in the run directory, and the seconds of each part of a step: the
        median over ranks, the slowest rank, and what the plan expects.

        Args:
            steps: number of steps to profile, up to 100.
            on_note: callback that gets a line of text about what this call waits for.

        Returns:
            What `mhmoe profile --json` prints.

        Raises:
            RunError: the run has ended without a profile, or ends before it has one; or it was imported.
            ClusterError, StorageError: the cluster or the storage has not answered for a while.
        """
        from mhmoe_ray.api.profile import profile_run

        return profile_run(self._existing_directory, steps, on_note)

    def stop(self, now: bool = False, on_note: OnNote = ignore_note) -> str:
        """Stop the run, and return its state when it is over; `resume` can continue it.

        Its workers finish their step, validate, save a checkpoint and end. A job that is not training yet is ended at
        once.

        Args:
            now: whether to end its job at once, without a last checkpoint.
            on_note: callback that gets a line of text about what this call waits for.

        Returns:
            The state, such as stopped. It is unknown if the cluster does not answer: then the workers are asked to stop
                through the run directory, and this process cannot see whether they do.

        Raises:
            RunError: the run is over already, or was imported.
            ClusterError: the cluster does not answer, and only its job could end the run.
        """
        outcome = attempts.stop_run(self._existing_directory, now, on_note)
        return "unknown" if outcome is None else outcome.state

    def resume(
        self,
        until: int | None = None,
        overrides: Overrides = (),
        address: str | None = None,
        *,
        force: bool = False,
        trust_run: bool = False,
        on_note: OnNote = ignore_note,
    ) -> None:
        """Resume the run from its newest complete checkpoint, without waiting for it.

        The run must have stopped, failed or lost its cluster. With `until`, it trains longer than in its spec, even if
        it is finished. A learning rate that has decayed then stays at its last value, `min_lr`.

        Args:
            until: number of steps up to which it trains; None for the number in its spec.
            overrides: keys of the cluster section to change, such as `{"cluster.workers": 2}`, and `train.profile`; any
                keys but `name` and `storage` while the run has no weights.
            address: a Ray cluster; None for the one that the run was on.
            force: whether to resume it even if its cluster does not answer and it wrote something a moment ago.
            trust_run: whether to resume a run that somebody else submitted and whose spec sets `cluster.runtime_env`,
                `serve.host`, `serve.keys`, `serve.cors_origins` or `serve.vllm`.
            on_note: callback that gets lines of text about the progress.

        Raises:
            RunError: the run is running, may still be running, is finished, was imported, or cannot have so many steps.
            SpecError: an override is wrong or changes a key that must not change, `until` is not a whole number, or the
                run needs `trust_run`.
            DataError: the overrides ask for data that cannot be used.
            ClusterError, JobError: the cluster cannot be reached or hold the run, or does not accept its job.
        """
        if until is not None and not isinstance(until, Integral):
            raise SpecError("until", f"it is {until!r}", "give a whole number of steps")
        run, override_texts = self._existing_directory, override_list(overrides)
        other_keys = [
            keys
            for keys, _ in parse_overrides(override_texts)
            if keys[0] != "cluster" and [*keys[:2]] != ["train", "profile"]
        ]
        for keys in other_keys:
            if keys[0] in ("name", "storage") or events.has_weights(run):
                reason = "a resumed run must go on exactly as it would have"
                fix = (
                    "change only cluster keys and train.profile, or submit a run that starts from this one (start.from)"
                )
                raise SpecError(f"override {'.'.join(keys)}", reason, fix)
        previous_attempt = last_attempt(run)
        outcome = attempts.final_outcome(run, force, given_addresses=[address] if address else [])
        if outcome.state == "finished" and until is None:
            fix = f"train it longer: `mhmoe resume {attempts.run_argument(run)} --until STEPS`"
            raise RunError(f"run {run.id}", "it is finished", fix)
        spec = load_resolved_spec(run.spec_file)
        if not trust_run:
            require_submitted_settings(run, spec)
        changed_tree = apply_overrides(spec.model_dump(mode="json"), override_texts)
        spec = run.relocated_spec(validate_section(RunSpec, changed_tree, f"spec {run.spec_file}"))
        if until is not None:
            spec = attempts.extended_spec(run, spec, int(until), on_note)
        if other_keys:
            check_training(spec)
        address = address or require_known(attempts.attempt_address(previous_attempt))
        attempts.start_run(spec, address, on_note, ended_run=run)

    def check_resume(
        self,
        address: str | None = None,
        *,
        force: bool = False,
        trust_run: bool = False,
        on_note: OnNote = ignore_note,
    ) -> "ResumeCheck":
        """Repeat the steps between the run's last two checkpoints on a cluster, and compare them with the recorded.

        The run must have stopped, finished, failed or lost its cluster, and stays unchanged. The repetition has as many
        workers as the run had, and compares bits on CPUs, which need to be of the same kind as those that trained. With
        a single checkpoint, steps are repeated from the run's start.

        Args:
            address: a Ray cluster; None for the one that the run was on.
            force: whether to repeat steps even if the run's cluster does not answer and the run wrote something a
                moment ago.
            trust_run: whether to repeat steps of a run that somebody else submitted, as for `resume`.
            on_note: callback that gets lines of text about the progress.

        Returns:
            Each repeated step with its loss, gradient norm and digest of samples, the tensors of the last checkpoint
                that differ, and whether all is equal (`is_equal`).

        Raises:
            RunError: the run is running, may still be running, was imported, or has nothing to repeat.
            CheckpointError, DataError: a checkpoint or the data is damaged, or gone.
            SpecError: the run needs `trust_run`.
            ClusterError, JobError: the cluster cannot be reached or hold the run, or the repetition failed.
        """
        from mhmoe_ray.api.repetition import check_resume

        return check_resume(self._existing_directory, address, force, trust_run, on_note)

    def evaluate(
        self,
        text: Texts = (),
        *,
        tasks: str | Sequence[str] = (),
        checkpoint: CheckpointName | None = None,
        samples: int | None = None,
        overrides: Overrides = (),
        task_folders: Texts = (),
        limit: int | None = None,
        gpus: int | None = None,
        prior: Prior | None = None,
        probe: str | PathLike[str] | None = None,
        recompute: bool = False,
        address: str | None = None,
        trust_run: bool = False,
        on_note: OnNote = ignore_note,
    ) -> Evaluation:
        """Return the scores of a checkpoint on raw text, by domain and language, or in lm-eval's tasks.

        With neither text nor tasks, the run's held-out text is used. A job on the cluster computes the scores, unless
        the run directory holds them already. They are computed again if a file of the text has changed.

        Args:
            text: folders, files or patterns of raw text, or one of them.
            tasks: names of lm-eval's tasks, or one of them; `english` and `xnli` stand for the MH-MoE papers' tasks.
            checkpoint: one of the run's checkpoints, its name or its step; None for the newest.
            samples: largest number of samples of each domain of the text; None for 512.
            overrides: keys of a spec's `data` section with which the text is read.
            task_folders: folders of your own tasks, as lm-eval reads them.
            limit: largest number of questions of each task; None for all.
            gpus: number of GPUs, 0 or 1; None for as many as a worker of the training had.
            prior: prior probabilities of the domains, with which all experts of a model with router `domain` predict
                together; None if the domain of each text is known.
            probe: images on which a linear probe of an encoder is trained, which then classifies those of `text`.
            recompute: whether to evaluate even if the run directory holds the result.
            address: a Ray cluster; None for the default cluster.
            trust_run: whether to use the `cluster.runtime_env` of a run that somebody else submitted.
            on_note: callback that gets lines of text about the progress.

        Raises:
            CheckpointError: there is no such checkpoint, or it is damaged.
            SpecError: an argument lacks the one that it belongs to, such as `limit` without `tasks`; or an override is
                wrong.
            RunError: there is neither text nor a task, and the run was imported.
            DataError: the text is missing.
            MhmoeError: the job failed; this is the error that it logged.
        """
        options = EvaluationOptions(
            text=text,
            overrides=override_list(overrides),
            samples=samples,
            tasks=tasks,
            task_folders=task_folders,
            limit=limit,
            gpus=gpus,
            prior=prior,
            probe=probe,
        )
        directory = self._existing_directory
        return evaluate(directory, checkpoint, options, recompute, address, trust_run=trust_run, on_note=on_note)

    def export(
        self,
        folder: str | PathLike[str],
        checkpoint: CheckpointName | None = None,
        on_note: OnNote = ignore_note,
        *,
        merge: bool = False,
        base: str | PathLike[str] | None = None,
    ) -> ExportResult:
        """Write a checkpoint in Hugging Face's layout, which transformers, vLLM and lm-eval read.

        A checkpoint with an adapter is written in PEFT's layout instead.

        Args:
            folder: folder to write, which must not exist or must be empty.
            checkpoint: one of the run's checkpoints, its name or its step; None for the newest.
            on_note: callback that gets a line of text about what is exported.
            merge: whether the sums of base and adapter are written in place of an adapter.
            base: exported base of an adapter, a folder or hf:ORGANIZATION/NAME; by default what the run started from.

        Returns:
            The model type, and the number and bytes of the tensors.

        Raises:
            CheckpointError: there is no such checkpoint, it is damaged, its adapter changes nothing, `base` is another
                model, or the folder cannot be written.
        """
        # This import is delayed, because the module imports torch, which takes long.
        from mhmoe_ray.checkpoint.huggingface.peft_export import export_checkpoint

        # A damaged checkpoint must not be exported, so all of its weights are hashed first.
        path, manifest = pick_checkpoint(self._existing_directory, checkpoint, verify_hashes=True, on_note=on_note)
        on_note(Activity("exporting", f"{path.name} of {self.id}"))
        base = path_text(base) if base else None
        return export_checkpoint(path, manifest, Path(folder), merge=merge, base=base)

    def track(self) -> dict[str, int]:
        """Send the steps that the tracking servers of the spec lack; return the number of unsent steps by server.

        Raises:
            JobError: the package or the key of a server is missing here.
            RunError: the run has not ended.
        """
        from mhmoe_ray.train.telemetry.servers import send_history

        end_states: dict[str, Any] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
        state = self.state
        if state not in end_states:
            raise RunError(f"run {self.id}", f"it is {state}", "wait for its end: workers send metrics themselves")
        return send_history(self._existing_directory, end_states[state])

    def remove(self, *, force: bool = False) -> None:
        """Remove the run with all its checkpoints. This cannot be undone.

        Args:
            force: whether to remove the run even if its cluster does not answer and the run wrote something a moment
                ago, or if a cluster that served the run does not answer.

        Raises:
            RunError: the run is running or served, or may still be.
            StorageError: the storage is read-only or out of reach.
            TokenError: a cluster of the run asks for another token, so its state is unknown.
        """
        attempts.check_removable(self._existing_directory, force)
        self.directory.remove()
