"""A stage's batch job, by Submitit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from durable_files import publish_once, write_json
from halo_cluster.attempts import utc_now
from halo_cluster.jobs import EndedJob, LiveJob, SchedulerUnreachable, StageJob, SubmissionRefused
from halo_cluster.record import input_hash
from halo_cluster.slurm import queue
from halo_cluster.slurm.launcher import Launcher
from halo_cluster.slurm.settings import SlurmSettings


@dataclass(frozen=True)
class Slurm:
    """The Scheduler for Slurm. `program` is called on every node with the path of a stage's work as its last word."""

    settings: SlurmSettings
    program: tuple[str, ...]
    failures: int = 0
    """Retries by the job itself; for chains that no driver looks after."""

    def live(self) -> dict[str, list[LiveJob]]:
        return queue.live_jobs()

    def ended(self, jobs: Iterable[str]) -> dict[str, EndedJob]:
        return queue.ended_jobs(jobs)

    def cancel(self, jobs: Sequence[str]) -> None:
        queue.cancel(jobs)

    def start_now(self, jobs: Sequence[str]) -> None:
        queue.start_now(jobs)

    def release(self, jobs: Sequence[str]) -> None:
        queue.release(jobs)

    def submit(self, job: StageJob, *, after: Sequence[str] = (), exclude: Sequence[str] = ()) -> str:
        executor = self._executor(job, after, exclude)
        launcher = Launcher((*self.program, str(_write_work(job))), self.failures)
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        try:
            submitted = executor.submit(launcher)
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
        """The batch script, as it would be submitted now. Writes nothing."""
        executor = self._executor(job, (), ())
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
    """Submitit's, with its files in `folder`; ValueError where it or Slurm is missing."""
    try:
        from submitit import SlurmExecutor
    except ModuleNotFoundError:
        raise ValueError("Submitit is not installed; `pip install 'hypenet-megatron[slurm]'`") from None
    try:
        return SlurmExecutor(folder=folder)
    except RuntimeError:
        raise ValueError("`srun` is not on PATH; run this where Slurm's commands are") from None


def refusal_of(said: str) -> Exception:
    """What sbatch said: its last line. A controller that is away is no verdict on the job."""
    lines = [line for line in said.strip().splitlines() if line.strip()]
    line = next((line for line in lines if "sbatch: error" in line), lines[-1] if lines else "sbatch failed")
    if "Unable to contact" in said or "Connection refused" in said or "timed out" in said:
        return SchedulerUnreachable(line)
    return SubmissionRefused(f"Slurm refused the job: {line}; correct the recipe's cluster section")


def _write_work(job: StageJob) -> Path:
    """Under the name of its content: submissions of the same work share it, whoever makes them."""
    path = job.jobs_folder / f"work.{input_hash(job.work)}.json"
    publish_once(path, job.work)
    return path
