"""One transformation: plan, stacks, state, refresh, step. Knows no framework."""
