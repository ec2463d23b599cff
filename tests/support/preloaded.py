"""What processes of the fork server have imported when they start."""
# ruff: noqa: F401

import halo_jobs.pipeline
import halo_jobs.stages.export
import halo_jobs.stages.fan_out
import halo_jobs.stages.measure
import halo_jobs.stages.select
import halo_jobs.stages.training
import halo_reports.build
import halo_training.trainer
import hypenet_kernels.decode
import hypenet_tools.convert
import hypenet_tools.export
