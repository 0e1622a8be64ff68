"""An OpenAI-compatible HTTP server over the engine's slots: each request its own adapter, each token its own experts."""
