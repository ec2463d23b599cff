"""A real Slurm of four nodes on one Debian machine, for trying recipes and injecting faults.

`layout` says where its files lie and what its parts are called, `configuration` writes Slurm's files, `packages` and
`network` prepare the machine, `processes`, `services` and `nodes` start and stop things, `sandbox` does it in order.
Python's standard library alone, so that it runs before the project is installed.
"""
