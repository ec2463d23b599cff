"""The report of a run: one self-contained HTML page made from the files that the stages published."""

from halo_reports.build import build_report
from halo_reports.run_facts import RunFacts, load_run

__all__ = ["RunFacts", "build_report", "load_run"]
