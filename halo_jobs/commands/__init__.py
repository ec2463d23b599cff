"""The subcommands of `halo`. Each imports torch, zarr or matplotlib only when it runs and needs them."""
