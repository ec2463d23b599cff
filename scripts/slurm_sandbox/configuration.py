"""Slurm's configuration files for a sandbox."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from .layout import Layout

CPUS, MEMORY_MB, GPUS = 4, 4000, 2  # what each node claims, whatever the machine has


def write(layout: Layout) -> None:
    """slurm.conf, gres.conf and cgroup.conf."""
    gpus = _make_gpus(layout)
    layout.slurm_conf.write_text(_slurm_conf(layout, gpus))
    nodes = f"n[1-{layout.node_count}]"
    device = f"{layout.folder}/gpu/gpu[0-{GPUS - 1}]"
    (layout.folder / "etc" / "gres.conf").write_text(
        f"NodeName={nodes} Name=gpu File={device}\n" if gpus else ""
    )
    (layout.folder / "etc" / "cgroup.conf").write_text("CgroupAutomount=no\nCgroupPlugin=cgroup/v1\n")


def _make_gpus(layout: Layout) -> int:
    """GPUs that Slurm can count and allocate. It accepts device nodes only, so they are copies of /dev/null."""
    try:
        for number in range(GPUS):
            device = layout.folder / "gpu" / f"gpu{number}"
            os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:  # a container that may not make device nodes
        return 0
    return GPUS


def _slurm_conf(layout: Layout, gpus: int) -> str:
    folder = layout.folder
    gres = f"Gres=gpu:{gpus}" if gpus else ""
    nodes = "\n".join(
        f"NodeName={node} NodeAddr={layout.node_address(node)} Port={layout.node_port(node)} "
        f"NodeHostname={node if layout.in_namespaces else layout.head} "
        f"CPUs={CPUS} RealMemory={MEMORY_MB} {gres} State=UNKNOWN"
        for node in layout.nodes
    )
    return f"""\
ClusterName=sandbox
SlurmctldHost={layout.head}({layout.head_address})
SlurmctldPort={layout.port("slurmctld")}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its earlier credential has expired: 6 s here, 121 s by default.
AuthInfo=cred_expire=5

StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/pid/slurmctld.slurm
SlurmdPidFile={folder}/pid/slurmd.%n.slurm
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
MailProg=/bin/true

# Neither systemd nor cgroups are needed.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=5
SwitchType=switch/none
MpiDefault=none

# Nodes may claim more than the machine has. A job that requests no memory leaves some for others.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=500
{"GresTypes=gpu" if gpus else ""}

# A node that is silent for this long is down; because of TCPTimeout's retries it takes three times as long.
SlurmdTimeout=5
TCPTimeout=1
MessageTimeout=10
ReturnToService=2
InactiveLimit=0
KillWait=5
UnkillableStepTimeout=15
KillOnBadExit=1
JobRequeue=1
CompleteWait=0
OverTimeLimit=0
MinJobAge=300

PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=1,requeue_setup_env_fail
PriorityType=priority/basic

AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={layout.head_address}
AccountingStoragePort={layout.port("slurmdbd")}
{"AccountingStorageTRES=gres/gpu" if gpus else ""}

{nodes}
PartitionName=DEFAULT Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=REQUEUE GraceTime=0
PartitionName=batch Default=YES
PartitionName=grace GraceTime=20
PartitionName=urgent PriorityTier=100 PreemptMode=OFF
"""


def write_slurmdbd(layout: Layout, password: str) -> None:
    path = Path(layout.folder / "etc" / "slurmdbd.conf")
    path.touch(mode=0o600)
    path.write_text(f"""\
AuthType=auth/munge
DbdHost={layout.head if layout.in_namespaces else "localhost"}
DbdAddr={layout.head_address}
DbdPort={layout.port("slurmdbd")}
SlurmUser=root
DebugLevel=info
LogFile={layout.folder}/log/slurmdbd.log
PidFile={layout.folder}/pid/slurmdbd.slurm
StorageType=accounting_storage/mysql
StorageHost={layout.head_address}
StoragePort={layout.port("mariadb")}
StorageUser=slurm
StoragePass={password}
StorageLoc=slurm_acct_db
""")
