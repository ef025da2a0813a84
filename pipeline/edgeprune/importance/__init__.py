"""How much the model would miss each unit of each channel group: rules in a dictionary, one function each.

    weights      l1, l2, geometric-median, group-norm, batch-norm-scale, random     need nothing but the model
    activations  activation-entropy                                                 needs images
    gradients    taylor                                                             needs labelled images

Every rule gives each class of coupled channels one number, made from all members of the class that the rule looks at
(`members`). Numbers of one rule compare units of one group; what they say between groups is stated by each rule.
"""

from edgeprune.importance.needs import Given, Needs
from edgeprune.importance.rules import RULES, Rule, check_at_hand, check_needs, ranking, unit_importance

__all__ = ["RULES", "Given", "Needs", "Rule", "check_at_hand", "check_needs", "ranking", "unit_importance"]
