"""Every method on the same kernel, on the same queries, keys and values of a real model."""
