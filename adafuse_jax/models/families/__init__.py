"""Model families, one file each: what of config.json and of the tensors' names is their own."""
