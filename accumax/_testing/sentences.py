"""What `check_update` says beside its table."""

HIDDEN = (
    "The first update of this optimizer is nearly the same for a gradient of twice the "
    "size, so a wrong scale or a mean of means may pass. Check with optax.sgd(1.0) too."
)
HIDES = (
    "The update is right, and the gradient is not: {fault}. The first update of this "
    "optimizer is nearly the same for a gradient of twice the size."
)
VISIBLE = 0.1  # of the update, up to which the big batch's own error is no warning
UNSEEN = (
    "The big batch's own update is {own:.0%} of itself away from what float64 gives: "
    "its precision hides faults of that size. Use a larger learning rate, parameters "
    "in float32, or data and parameters for which the loss is better conditioned."
)
ROUNDING = 1e-3  # of a gradient in float32, relative to it
COUPLED = (
    "The loss is not the mean over these items: the mean of its gradients over the "
    "microbatches is {far:.1%} off its gradient for the batch. Where microbatches have "
    "other weights (tokens), pass them as weights=. Else the loss couples the rows, as "
    "a contrastive loss, a square root of the mean or BatchNorm do, and no mean of "
    "microbatches is the big batch: see docs/coupled_losses.md."
)
MOVING = (
    "The parameters moved within the window: each gradient is that of the parameters "
    "after the update of the microbatch before. Add the gradients up, and update once."
)
DISAGREE = (
    "Update and diagnosis disagree. The diagnosis takes each row for one item. Where "
    "microbatches have other weights (tokens), pass them as weights=. Else the step "
    "has another optimizer."
)
