"""The same models in torch: Hugging Face, PEFT LoRA, and a layer-wise mixture of LoRA experts."""
