"""One device adapter per file, opened by profile through `edgeprune.target.open_target`."""
