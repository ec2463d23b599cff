"""Looking at runs from outside, by their folders alone: for a terminal, for scripts, and for Prometheus.

Whoever ran a stage, and where, does not matter, for all executors leave the same files. Nothing is written here and no
lock is taken, so looking disturbs nobody and works from every machine that sees the folder.
"""
