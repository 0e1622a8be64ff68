"""`make demo`: a small backbone, AdaFuse adapters on top, and what they change, from nothing in minutes on two CPU cores."""
