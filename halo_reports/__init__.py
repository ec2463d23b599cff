"""The report of a run, its model card, and its state while it runs. All are made from the files of the run folder.

Import from the modules: `monitoring` needs no plotting library, `build` does.
"""
