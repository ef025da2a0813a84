"""PAODING: merge dense units in pairs by what the merge can do to the output, and drop weak filters.

After Meng et al., arXiv 2405.00074 and 2204.00783, from their algorithm as published in code and words; what differs
on purpose stands where it differs. `walk.walk` is the way in.

    module, graph, structure ─network.read─▶ Network ─walk.walk─▶ Walk ─walk.merged─▶ module of the unpruned shapes
"""
