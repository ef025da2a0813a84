"""The Decay Pruning Method: channels that must go shrink to nothing over N optimiser steps, and gradients may object.

    from edgeprune.decay.flat import Flat            # all parameters and gradients of a module in two tensors
    from edgeprune.decay.units import find_units      # which of their rows belong to which unit of which channel group
    from edgeprune.decay.wrapper import DecayOptimiser    # around any torch.optim.Optimizer

After "Decay Pruning Method: Smooth Pruning With a Self-Rectifying Procedure" (arXiv 2406.03879). Smooth pruning
follows the paper's formula; its rectification is known here in words only and was re-derived, see
`edgeprune.decay.rectify`.
"""
