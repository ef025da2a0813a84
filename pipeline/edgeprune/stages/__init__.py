"""The stages of a deploy, in the order of the line in `edgeprune.deploy`: each a module, each resumable."""
