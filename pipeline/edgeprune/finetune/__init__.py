"""Train the cut model further, with the unpruned model as its teacher; any kill costs at most half a minute.

    loss = (1 − a) · cross-entropy(student, labels) + a · T² · KL(softmax(teacher / T) ‖ softmax(student / T))

(Hinton et al. 2015, "Distilling the knowledge in a neural network", section 2.) The optimiser is SGD with Nesterov
momentum; the learning rate warms up over the first twentieth of the steps and falls along a cosine to zero.

What is returned is the best model by the validation split among the starting point and the end of every epoch, the
later of equals. The test split is not here to be looked at.

Everything random is a function of the seed and the step, so a run that was killed and resumed ends, in float32 and on
the same number of threads, bit for bit where the undisturbed run ends.

    run ─▶ learner: the cut model as it is (one-step), or the unpruned one whose channels decay first (decay)
"""

from edgeprune.finetune.decaying import check_decaying
from edgeprune.finetune.facts import FinetuneResult, Progress
from edgeprune.finetune.loss import distillation_loss, faster_precision, learning_rate
from edgeprune.finetune.run import finetune, finetune_decaying

__all__ = [
    "FinetuneResult",
    "Progress",
    "check_decaying",
    "distillation_loss",
    "faster_precision",
    "finetune",
    "finetune_decaying",
    "learning_rate",
]
