"""Monitors runs by reading their folders: for terminals, scripts and Prometheus.

All executors write the same files. Monitoring writes nothing and takes no lock, so it cannot disturb a run. It works on
every machine that sees the folder.
"""
