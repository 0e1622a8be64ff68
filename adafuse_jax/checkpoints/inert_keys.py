"""Keys of Hugging Face's configuration files that leave the function of a Llama-family decoder as it is.

They concern training from scratch, other tasks, the library itself, or bookkeeping; transformers does not read them when it
computes the logits of these families.
"""

from __future__ import annotations

from typing import Any

INERT = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_flash_attn_2_enabled",
    "_from_model_config", "_name_or_path", "architectures", "attn_implementation", "cache_implementation",
    "chunk_size_feed_forward", "decoder_start_token_id", "finetuning_task", "gradient_checkpointing", "id2label",
    "initializer_range", "is_decoder", "label2id", "library_name", "license", "model_name", "model_max_length",
    "name_or_path", "num_labels", "output_attentions", "output_hidden_states", "output_scores", "prefix",
    "pretraining_tp", "problem_type", "return_dict", "return_dict_in_generate", "sep_token_id",
    "task_specific_params", "tf_legacy_loss", "tie_encoder_decoder", "tie_last_hidden_states", "tokenizer_class",
    "torchscript", "transformers_version", "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id",
})  # fmt: skip
"""Keys of both files that have no effect, whatever their value."""

INERT_VALUES: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,), "attention_bias": (False,), "attention_dropout": (0,),
    "embd_pdrop": (0,), "hidden_dropout": (0,), "is_encoder_decoder": (False,), "mlp_bias": (False,), "pruned_heads": ({},),
    "resid_pdrop": (0,), "residual_dropout": (0,), "use_mrope": (False,), "auto_map": ({},),
    "quantization_config": ({}, False), "quantization": ({}, False), "compression_config": ({}, False),
}  # fmt: skip
"""Keys of config.json → the values with which they have no effect."""

SUPPORTED_VALUES: dict[str, tuple[Any, ...]] = {
    "is_causal": (True,), "use_bidirectional_attention": (False,),
    "per_layer_config": ({},), "attention_chunk_size": (), "configuration_files": ([],),
}  # fmt: skip
"""Keys of config.json that transformers reads for every family, and that change the function → the values that do not."""

GENERATION_INERT: dict[str, tuple[Any, ...]] = {
    "do_sample": (False,), "temperature": (1.0,), "top_k": (0, 50), "top_p": (1.0,), "typical_p": (1.0,), "min_p": (0.0,),
    "repetition_penalty": (1.0,), "encoder_repetition_penalty": (1.0,), "length_penalty": (1.0,), "num_beams": (1,),
    "num_beam_groups": (1,), "num_return_sequences": (1,), "no_repeat_ngram_size": (0,), "diversity_penalty": (0.0,),
    "max_length": (20,), "min_length": (0,), "guidance_scale": (1.0,), "epsilon_cutoff": (0.0,), "eta_cutoff": (0.0,),
    "renormalize_logits": (False,), "early_stopping": (False,), "remove_invalid_values": (False,), "bad_words_ids": ([],),
    "suppress_tokens": ([],), "begin_suppress_tokens": ([],), "encoder_no_repeat_ngram_size": (0,),
    "exponential_decay_length_penalty": (), "forced_bos_token_id": (), "forced_eos_token_id": (),
}  # fmt: skip
"""Settings of generation_config.json → the values with which they do not change greedy decoding. transformers drops them
from config.json."""
