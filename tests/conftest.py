"""Shared fixtures; one device, no accelerator, so that numbers repeat."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
