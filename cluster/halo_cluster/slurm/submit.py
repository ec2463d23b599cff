"""Submits stages as batch jobs, through Submitit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from durable_files import publish_once, write_json
from halo_cluster.attempts import utc_now
from halo_cluster.jobs import SchedulerUnreachable, StageJob, SubmissionRefused
from halo_cluster.record import input_hash
from halo_cluster.slurm import queue
from halo_cluster.slurm.job import Exec
from halo_cluster.slurm.settings import SlurmSettings


@dataclass(frozen=True)
class Slurm:
    """The Scheduler for Slurm. Every node runs `python MODULE... WORK_FILE RETRIES`."""

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
        executor = self._executor(job, after, exclude)
        command = Exec((*self.module, str(_write_work(job)), str(self.retries)))
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        try:
            submitted = executor.submit(command)
        except (FailedJobError, FailedSubmissionError) as refusal:
            raise refusal_of(str(refusal)) from None
        note = {
            "job": submitted.job_id,
            "name": job.job_name,
            "submitted": utc_now(),
            "exclude": list(exclude),
        }
        write_json(job.jobs_folder / f"{submitted.job_id}.json", note)
        return str(submitted.job_id)

    def preview(self, job: StageJob) -> str:
        """The batch script that `submit` would submit. Writes nothing."""
        executor = self._executor(job, (), ())
        # Submitit has no public way to make a script without submitting it; a test compares this with a submission.
        return str(executor._make_submission_file_text(executor._submitit_command_str, "preview"))

    def _executor(self, job: StageJob, after: Sequence[str], exclude: Sequence[str]) -> Any:
        dependency = ["singleton", *([f"afterok:{':'.join(after)}"] if after else [])]
        nodes = self.settings.nodes if job.processes > 1 else 1
        self.settings.check()
        executor = submitit_executor(job.jobs_folder)
        executor.update_parameters(
            **self.settings.submitit_parameters(nodes),
            job_name=job.job_name,
            comment=f"halo {job.record.folder.parent.parent.name} {job.name}",
            dependency=",".join(dependency),
            exclude=",".join(exclude) or None,
            stderr_to_stdout=True,
            srun_args=["--kill-on-bad-exit=1", *self.settings.srun_arguments()],
            additional_parameters={"kill-on-invalid-dep": "yes", "requeue": True, **self.settings.sbatch},
        )
        return executor


def submitit_executor(folder: Path) -> Any:
    """A SlurmExecutor with its files in `folder`; ValueError if Submitit or Slurm is missing."""
    try:
        from submitit import SlurmExecutor
    except ModuleNotFoundError:
        raise ValueError("Submitit is not installed; `pip install 'hypenet-megatron[slurm]'`") from None
    try:
        return SlurmExecutor(folder=folder)
    except RuntimeError:
        raise ValueError("`srun` is not on PATH; run this where Slurm's commands are") from None


def refusal_of(said: str) -> Exception:
    """The exception for the output of a failed sbatch. A controller that does not answer has not refused the job."""
    lines = [line for line in said.strip().splitlines() if line.strip()]
    line = next((line for line in lines if "sbatch: error" in line), lines[-1] if lines else "sbatch failed")
    if "Unable to contact" in said or "Connection refused" in said or "timed out" in said:
        return SchedulerUnreachable(line)
    return SubmissionRefused(f"Slurm refused the job: {line}; correct the recipe's cluster section")


def _write_work(job: StageJob) -> Path:
    """Named by its content: all submissions of the same work share the file."""
    path = job.jobs_folder / f"work.{input_hash(job.work)}.json"
    publish_once(path, job.work)
    return path
