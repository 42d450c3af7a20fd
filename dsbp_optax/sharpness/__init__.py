"""Wrappers that train where the loss is sharp, inside the eigenbases."""
