"""Per-sample gradient factors of a model's linear layers: which layers, which loss, and the hooks that collect them."""
