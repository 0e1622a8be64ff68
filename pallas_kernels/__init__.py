"""GPU kernels of AdaFuse, one folder each: a plain-XLA reference, the kernels, and the public function that chooses."""
