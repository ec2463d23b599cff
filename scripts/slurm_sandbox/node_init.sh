#!/bin/sh
# The first process of a node. $1 is the node's name, $2 its host table. When it ends, all on the node ends, and it
# ends with slurmd, so slurmd is the machine's power switch. As a shell it also reaps the orphans of the node's jobs.
set -e
hostname "$1"
mount --bind "$2" /etc/hosts
mount -t tmpfs -o size=2g tmpfs /dev/shm
# Ray keeps its sockets here; on real nodes this folder is not shared either.
mkdir -p /tmp/ray
mount -t tmpfs -o size=1g tmpfs /tmp/ray
# -b: "this machine was just switched on". Otherwise a node that is back soon would pass for one that never was away.
slurmd -D -b -N "$1" &
wait $!
