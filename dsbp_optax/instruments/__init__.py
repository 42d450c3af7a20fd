"""Read-only figures of optimizers, losses and training runs."""
