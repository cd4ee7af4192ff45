"""Tiny random models of the families that people fine-tune, made from their configurations."""

from collections.abc import Callable
from typing import Any

SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
ENDS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}


def _made(name: str, model: str = "", **changes: Any) -> Callable[[int], Any]:
    """A causal model of a family, by the names of its classes, for a vocabulary of so many ids."""

    def make(vocabulary: int) -> Any:
        import torch
        import transformers

        settings = {**SIZE, **ENDS, "vocab_size": vocabulary, "tie_word_embeddings": False, **changes}
        settings = {k: v for k, v in settings.items() if v is not ...}
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**settings)
        return getattr(transformers, model or f"{name}ForCausalLM")(config).eval()

    return make


def _nested(vocabulary: int) -> Any:
    """A model for images and text, whose configuration of the text lies within."""
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(0)
    text = {**SIZE, **ENDS, "vocab_size": vocabulary, "sliding_window": 16, "query_pre_attn_scalar": 8}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 4,
    }
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=5)
    return Gemma3ForConditionalGeneration(config).eval()


SIZELESS: dict[str, Any] = dict.fromkeys(SIZE, ...)
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "tie_word_embeddings": True}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

FAMILIES: dict[str, Callable[[int], Any]] = {
    "llama-tied": _made("Llama", tie_word_embeddings=True),
    "seed-oss-bias": _made("SeedOss", attention_bias=True, tie_word_embeddings=True),
    "qwen3": _made("Qwen3"),
    "mistral-sliding": _made("Mistral", sliding_window=16),
    "gemma2-softcap": _made("Gemma2", tie_word_embeddings=True, sliding_window=16, query_pre_attn_scalar=8),
    "gemma3-nested": _nested,
    "phi3-fused": _made("Phi3", head_dim=...),
    "gpt2": _made("GPT2", "GPT2LMHeadModel", **SIZELESS, **GPT2),
    "gpt-neox": _made("GPTNeoX"),
    "granite-scaled": _made("Granite", logits_scaling=8.0, tie_word_embeddings=True),
    "cohere-scaled": _made("Cohere", logit_scale=0.25, tie_word_embeddings=True),
    "olmo2": _made("Olmo2"),
    "mixtral-experts": _made("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen3-experts": _made("Qwen3Moe", **MOE, decoder_sparse_step=1, mlp_only_layers=[]),
    "olmoe-experts": _made("Olmoe", num_experts=4, num_experts_per_tok=2),
    "gpt-oss-experts": _made("GptOss", num_local_experts=4, num_experts_per_tok=2, sliding_window=16),
    "deepseek-experts": _made(
        "DeepseekV3",
        head_dim=...,
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        moe_intermediate_size=32,
    ),
    "llama4-experts": _made(
        "Llama4Text",
        "Llama4ForCausalLM",
        intermediate_size_mlp=64,
        num_local_experts=2,
        num_experts_per_tok=1,
        attention_chunk_size=64,
    ),
    "mamba": _made("Mamba", state_size=4),
    "qwen3-next": _made(
        "Qwen3Next",
        **MOE,
        shared_expert_intermediate_size=32,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        layer_types=["linear_attention", "full_attention"],
        decoder_sparse_step=1,
    ),
    "lfm2-conv": _made("Lfm2"),
    "falcon": _made("Falcon", head_dim=..., new_decoder_architecture=True, num_kv_heads=2),
    "opt": _made("OPT", ffn_dim=64, word_embed_proj_dim=32),
    "bloom": _made("Bloom", n_layer=2, n_head=4),
    "stablelm": _made("StableLm"),
    "bert-both-ways": _made("Bert", "BertLMHeadModel", is_decoder=False),
}
