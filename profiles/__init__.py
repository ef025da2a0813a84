"""One device per TOML file."""
