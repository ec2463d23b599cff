"""Submits stages as batch jobs, through Submitit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from durable_files import publish_once, write_json
from halo_cluster.attempts import utc_now
from halo_cluster.jobs import SchedulerUnreachable, StageJob, SubmissionRefused
from halo_cluster.record import input_hash
from halo_cluster.slurm import queue
from halo_cluster.slurm.job import become_python
from halo_cluster.slurm.settings import SlurmSettings


@dataclass(frozen=True)
class Slurm:
    """What the reconciler calls. Every node of a job runs `python MODULE... WORK_FILE RETRIES`."""

    settings: SlurmSettings
    module: tuple[str, ...]
    retries: int = 0
    """How often a job requeues itself after a failure; for jobs that no driver monitors."""

    live = staticmethod(queue.live_jobs)
    ended = staticmethod(queue.ended_jobs)
    cancel = staticmethod(queue.cancel)
    start_now = staticmethod(queue.start_now)
    release = staticmethod(queue.release)

    def submit(self, job: StageJob, *, after: Sequence[str] = (), exclude: Sequence[str] = ()) -> str:
        """Run `job` once the jobs `after` have succeeded, on none of the nodes `exclude`; returns the job's id."""
        executor = self._executor(job, after, exclude)
        # Named by its content: all submissions of the same work share the file.
        work = job.jobs_folder / f"work.{input_hash(job.work)}.json"
        publish_once(work, job.work)
        with refusals():
            submitted = executor.submit(become_python, *self.module, str(work), str(self.retries))
        note = {"submitted": utc_now(), "exclude": list(exclude)}
        write_json(job.jobs_folder / f"{submitted.job_id}.json", note)
        return str(submitted.job_id)

    def preview(self, job: StageJob) -> str:
        """The batch script that `submit` would submit. Writes nothing."""
        executor = self._executor(job, (), ())
        # Submitit has no public way to make a script without submitting it; a test compares this with a submission.
        return str(executor._make_submission_file_text(executor._submitit_command_str, "preview"))

    def _executor(self, job: StageJob, after: Sequence[str], exclude: Sequence[str]) -> Any:
        dependency = ["singleton", *([f"afterok:{':'.join(after)}"] if after else [])]
        return submitit_executor(
            job.jobs_folder,
            self.settings,
            {"kill-on-invalid-dep": "yes", "requeue": True},
            nodes=self.settings.nodes if job.processes > 1 else 1,
            job_name=job.job_name,
            comment=f"halo {job.record.folder.parent.parent.name} {job.name}",
            dependency=",".join(dependency),
            exclude=",".join(exclude) or None,
        )


def submitit_executor(
    folder: Path, settings: SlurmSettings, flags: Mapping[str, str | bool], **parameters: Any
) -> Any:
    """A SlurmExecutor with its files in `folder`, for jobs with one process on each node.

    `parameters` are Submitit's; it passes `flags` to sbatch. ValueError if Submitit or Slurm is missing.
    """
    settings.check()
    try:
        from submitit import SlurmExecutor
    except ModuleNotFoundError:
        raise ValueError("Submitit is not installed; `pip install 'hypenet-megatron[slurm]'`") from None
    try:
        executor = SlurmExecutor(folder=folder)
    except RuntimeError:
        raise ValueError("`srun` is not on PATH; run this where Slurm's commands are") from None
    container = [f"--container-image={settings.container}"] if settings.container else []
    executor.update_parameters(
        **settings.submitit_parameters(),
        **parameters,
        stderr_to_stdout=True,
        srun_args=["--kill-on-bad-exit=1", *container],
        additional_parameters={**flags, **settings.sbatch},
    )
    return executor


@contextmanager
def refusals() -> Iterator[None]:
    """Raise SubmissionRefused for a failed sbatch, or SchedulerUnreachable: a controller that does not answer has not
    refused the job."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    try:
        yield
    except (FailedJobError, FailedSubmissionError) as refusal:
        said = str(refusal)
        lines = [line for line in said.strip().splitlines() if line.strip()]
        line = next((line for line in lines if "sbatch: error" in line), lines[-1] if lines else "sbatch failed")
        if "Unable to contact" in said or "Connection refused" in said or "timed out" in said:
            raise SchedulerUnreachable(line) from None
        raise SubmissionRefused(f"Slurm refused the job: {line}; correct the recipe's cluster section") from None
