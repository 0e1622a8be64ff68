"""The backbone: a Llama-family decoder with stacked per-layer weights."""
