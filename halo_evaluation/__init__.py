"""Offline evaluation: generated tasks (local proxies of public benchmarks), recall episodes, layer selection."""
