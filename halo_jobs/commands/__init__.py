"""The subcommands of `halo`, each thin. What needs torch, zarr or matplotlib is imported when a command runs."""
