"""Run by srun as one process per node: the sum of every rank's number, over gloo between the nodes."""

import os

import torch
import torch.distributed as dist

rank, size = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
dist.init_process_group("gloo", init_method="env://", rank=rank, world_size=size)
number = torch.tensor([rank + 1.0])
dist.all_reduce(number)
print(f"{os.uname().nodename} has {number.item():.0f}", flush=True)
dist.destroy_process_group()
