"""What a run has done: its report, its model card, and its state while it runs.

Import from the modules: `monitoring` needs no plotting library, `build` does.
"""
