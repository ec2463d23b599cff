"""Offline evaluation: tasks that this project generates (local proxies), the scorer interface, and the runner."""
