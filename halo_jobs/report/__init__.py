"""The report of a run: one self-contained HTML page made from the files that the stages published."""

from halo_jobs.report.build import build_report
from halo_jobs.report.outcome import usage_command
from halo_jobs.report.run_facts import RunFacts, load_run

__all__ = ["RunFacts", "build_report", "load_run", "usage_command"]
