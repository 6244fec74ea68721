"""The fixtures of tests/golden beyond the first: what each exercises, its checkpoint and its recorded run.

`make_fixtures.py` makes them. The checkpoints are as small as they can be with every feature of their family
switched on: windows shorter than the examples, norm weights and biases that are random, multipliers that are not 1.
Every row length (the K of a linear) is a multiple of 64: bitsandbytes 0.50.2 dequantises others wrongly on the CPU.
"""
from dataclasses import dataclass

VOCABULARY = 512

LONG_RUN = dict(steps=24, tokens_rows=112, max_length=128)
"""24 steps of 4 rows and the 16 rows of the held-out loss, with debug.safetensors."""

SHORT_RUN = dict(steps=12, tokens_rows=64, max_length=96, no_debug=True)


@dataclass(frozen=True)
class Fixture:
    exercises: str
    """One line of tests/golden/README.md."""
    config: dict
    """As the hub would have it, in the spelling of transformers 4; token ids and dtype are added."""
    tokenizer: str
    """A family of tok.py."""
    dtype: str = "bfloat16"
    spelling: str = "old"
    """`new`: config.json as transformers 5 saves it (rope_parameters, dtype)."""
    shards: int = 1
    stored: str | None = None
    """`nf4` or `fp4`: the checkpoint holds what bitsandbytes made, as save_pretrained writes it."""
    names: str = "module"
    """Of a wrapper's tensors. `module`: model.language_model.*, as its modules are called today; `hub`: as saved."""
    run: dict | None = None
    """Arguments of run_ref.py; LONG_RUN if none."""


def config(architecture, model_type, **more):
    common = dict(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, hidden_act="silu", max_position_embeddings=2048, rms_norm_eps=1e-5, rope_theta=10000.0,
        attention_dropout=0.0, initializer_range=0.02, use_cache=True, tie_word_embeddings=False,
    )
    return dict(architectures=[architecture], model_type=model_type, **(common | more))


def without(config, *keys):
    return {key: value for key, value in config.items() if key not in keys}


def llama(**more):
    return config("LlamaForCausalLM", "llama", intermediate_size=64, attention_bias=False, mlp_bias=False, pretraining_tp=1, tie_word_embeddings=True, **more)


def falcon(**more):
    llama_only = ["intermediate_size", "num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_theta", "tie_word_embeddings"]
    return without(config("FalconForCausalLM", "falcon", alibi=False, bias=False, hidden_dropout=0.0, layer_norm_epsilon=1e-5, multi_query=True, parallel_attn=True, **more), *llama_only)


GEMMA2 = config(
    "Gemma2ForCausalLM", "gemma2", head_dim=32, hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh", rms_norm_eps=1e-6,
    sliding_window=24, query_pre_attn_scalar=24, attn_logit_softcapping=6.0, final_logit_softcapping=12.0, attention_bias=False,
    cache_implementation="hybrid", tie_word_embeddings=True,
)

GEMMA3 = without(config(
    "Gemma3ForCausalLM", "gemma3_text", intermediate_size=64, num_hidden_layers=3, num_key_value_heads=1, head_dim=32,
    hidden_activation="gelu_pytorch_tanh", rms_norm_eps=1e-6, rope_theta=1000000, rope_local_base_freq=10000,
    rope_scaling=dict(rope_type="linear", factor=8.0), sliding_window=24, sliding_window_pattern=3, query_pre_attn_scalar=40,
    attn_logit_softcapping=None, final_logit_softcapping=None, attention_bias=False, cache_implementation="hybrid", tie_word_embeddings=True,
), "hidden_act")

YARN = dict(factor=4.0, original_max_position_embeddings=32)

FIXTURES = {
    "mistral": Fixture(
        "window of 24, head_dim of its own, 4 heads over 2, untied; bf16 in two shards",
        config("MistralForCausalLM", "mistral", head_dim=32, sliding_window=24), "mistral", shards=2,
    ),
    "qwen2": Fixture(
        "biases on q, k and v, 1 key head, window of 24 from layer 1 on (max_window_layers), untied",
        config("Qwen2ForCausalLM", "qwen2", num_key_value_heads=1, rms_norm_eps=1e-6, rope_theta=1000000.0, sliding_window=24, use_sliding_window=True, max_window_layers=1),
        "qwen2",
    ),
    "qwen2_tied": Fixture(
        "the small qwen2.5: tied, a sliding_window in the config that use_sliding_window switches off; short run",
        config("Qwen2ForCausalLM", "qwen2", intermediate_size=64, rms_norm_eps=1e-6, rope_theta=1000000.0, sliding_window=16, use_sliding_window=False, max_window_layers=0, tie_word_embeddings=True),
        "qwen2", run=SHORT_RUN,
    ),
    "qwen3": Fixture(
        "qk-norm, head_dim of its own, tied, vocabulary padded to 528; config.json in the new spelling",
        config("Qwen3ForCausalLM", "qwen3", vocab_size=528, head_dim=32, rms_norm_eps=1e-6, rope_theta=1000000, rope_scaling=None, attention_bias=False, sliding_window=None, use_sliding_window=False, max_window_layers=2, tie_word_embeddings=True),
        "qwen3", spelling="new",
    ),
    "gemma2": Fixture(
        "soft-caps 6 (attention) and 12 (logits), window of 24 on layer 0 only, query_pre_attn_scalar 24 with head_dim 32, norms before and after, 1 + w, scaled embeddings, tied",
        GEMMA2, "gemma",
    ),
    "gemma3": Fixture(
        "qk-norm, windows of 24 on layers 0 and 1, theta 10000 there and 1000000 with linear rope on layer 2, query_pre_attn_scalar 40 with head_dim 32, 1 key head, tied",
        GEMMA3, "gemma",
    ),
    "falcon7b": Fixture(
        "multi-query in one query_key_value, parallel block under one LayerNorm with biases, exact gelu, tied",
        falcon(new_decoder_architecture=False, apply_residual_connection_post_layernorm=False), "falcon",
    ),
    "falcon40b": Fixture(
        "new_decoder_architecture: query_key_value in 2 groups, two LayerNorms; f16",
        falcon(new_decoder_architecture=True, num_kv_heads=2), "falcon", dtype="float16",
    ),
    "falcon11b": Fixture(
        "new_decoder_architecture under one LayerNorm (num_ln_in_parallel_attn 1), new spelling; short run",
        falcon(new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1), "falcon", spelling="new", run=SHORT_RUN,
    ),
    "phi2": Fixture(
        "parallel block, LayerNorm, biases everywhere and on lm_head, rotary on 12 of 32 (0.4), gelu_new, vocabulary padded to 528; f16",
        without(config("PhiForCausalLM", "phi", vocab_size=528, intermediate_size=192, num_attention_heads=2, num_key_value_heads=2, hidden_act="gelu_new", layer_norm_eps=1e-5, partial_rotary_factor=0.4, qk_layernorm=False, rope_scaling=None, resid_pdrop=0.0, embd_pdrop=0.0), "rms_norm_eps"),
        "phi2", dtype="float16",
    ),
    "granite": Fixture(
        "embedding_multiplier 3, attention_multiplier 0.11, residual_multiplier 0.6, logits_scaling 2.5; tied, new spelling",
        config("GraniteForCausalLM", "granite", embedding_multiplier=3.0, attention_multiplier=0.11, residual_multiplier=0.6, logits_scaling=2.5, attention_bias=False, mlp_bias=False, rope_scaling=None, tie_word_embeddings=True),
        "qwen2", spelling="new",
    ),
    "smollm3": Fixture(
        "no rope on layer 1 (no_rope_layers), tied",
        config("SmolLM3ForCausalLM", "smollm3", rms_norm_eps=1e-6, rope_theta=2000000.0, rope_scaling=None, attention_bias=False, mlp_bias=False, no_rope_layers=[1, 0], no_rope_layer_interval=2, use_sliding_window=False, sliding_window=None, max_window_layers=2, layer_types=["full_attention"] * 2, tie_word_embeddings=True),
        "qwen2",
    ),
    "olmo2": Fixture(
        "norms after attention and MLP only, qk-norm over the whole width, untied",
        config("Olmo2ForCausalLM", "olmo2", rms_norm_eps=1e-6, rope_theta=500000, rope_scaling=None, attention_bias=False), "qwen2",
    ),
    "ministral": Fixture(
        "window of 24 on layer 0 only (layer_types), head_dim of its own, untied; new spelling",
        config("MinistralForCausalLM", "ministral", head_dim=32, sliding_window=24, layer_types=["sliding_attention", "full_attention"]), "mistral", spelling="new",
    ),
    "ministral3": Fixture(
        "yarn with mscale, and queries that grow with the position (llama_4_scaling_beta) from token 32 on; new spelling; short run",
        without(config("Ministral3ForCausalLM", "ministral3", head_dim=32, sliding_window=None, rope_parameters=dict(rope_type="yarn", rope_theta=10000.0, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.1, max_position_embeddings=2048, **YARN)), "rope_theta"),
        "mistral", spelling="new", run=SHORT_RUN,
    ),
    "llama_dynamic": Fixture(
        "rope dynamic, factor 2, beyond its 48 tokens: every batch is 96 long; short run",
        llama(max_position_embeddings=48, rope_scaling=dict(type="dynamic", factor=2.0)), "llama3", run=SHORT_RUN,
    ),
    "llama_yarn": Fixture(
        "rope yarn (`type`), attention factor by default; short run",
        llama(max_position_embeddings=128, rope_scaling=dict(type="yarn", **YARN)), "llama3", run=SHORT_RUN,
    ),
    "llama_yarn_factor": Fixture(
        "rope yarn with attention_factor 1.3, its own beta_fast and beta_slow, truncate false; new spelling; short run",
        llama(max_position_embeddings=128, rope_scaling=dict(rope_type="yarn", attention_factor=1.3, beta_fast=2.0, beta_slow=0.25, truncate=False, **YARN)), "llama3", spelling="new", run=SHORT_RUN,
    ),
    "llama_yarn_mscale": Fixture(
        "rope yarn with mscale 2 over mscale_all_dim 0.5; short run",
        llama(max_position_embeddings=128, rope_scaling=dict(rope_type="yarn", mscale=2.0, mscale_all_dim=0.5, **YARN)), "llama3", run=SHORT_RUN,
    ),
    "llama_stored_nf4": Fixture(
        "a checkpoint already quantised by bitsandbytes: nf4, double, made from bf16; short run",
        llama(), "llama3", stored="nf4", run=SHORT_RUN | dict(quant="nf4", stored=True),
    ),
    "llama_stored_fp4": Fixture(
        "a checkpoint already quantised by bitsandbytes: fp4, single, made from f16; short run",
        llama(), "llama3", dtype="float16", stored="fp4", run=SHORT_RUN | dict(quant="fp4", no_double_quant=True, stored=True),
    ),
    "gemma3_wrapper": Fixture(
        "Gemma3ForConditionalGeneration: text_config inside, tensors as on the hub, a vision tower beside; short run of the text part",
        dict(
            architectures=["Gemma3ForConditionalGeneration"], model_type="gemma3", text_config=without(GEMMA3 | dict(num_hidden_layers=2, sliding_window_pattern=2), "architectures"),
            vision_config=dict(model_type="siglip_vision_model", hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14, vision_use_head=False),
            mm_tokens_per_image=1, boi_token_index=508, eoi_token_index=509, image_token_index=510, initializer_range=0.02,
        ),
        "gemma", names="hub", run=SHORT_RUN | dict(targets="regex:.*language_model.*_proj"),
    ),
    "mistral3_wrapper": Fixture(
        "Mistral3ForConditionalGeneration, tensors named model.language_model.*, untied; new spelling; short run of the text part",
        dict(
            architectures=["Mistral3ForConditionalGeneration"], model_type="mistral3",
            text_config=without(config("", "mistral", intermediate_size=64, head_dim=32, sliding_window=None), "architectures"),
            vision_config=dict(model_type="pixtral", hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, head_dim=32, image_size=28, patch_size=14, hidden_act="silu", rope_theta=10000.0),
            image_token_index=10, spatial_merge_size=2, projector_hidden_act="gelu", multimodal_projector_bias=False, vision_feature_layer=-1, tie_word_embeddings=False,
        ),
        "mistral", spelling="new", run=SHORT_RUN | dict(targets="regex:.*language_model.*_proj"),
    ),
}

"""A run of one training option: as short as it can be."""
OPTION_RUN = dict(quant="none", steps=12, batch=2, max_length=96, lr=2e-3, r=4, alpha=8, tokens_rows=44, weight_decay=0.0, no_debug=True)

VARIANTS = {
    "gemma2_unquantised": ("gemma2", dict(LONG_RUN, quant="none", no_debug=True)),
    "falcon7b_unquantised": ("falcon7b", dict(LONG_RUN, quant="none", no_debug=True)),
    "loraplus": (
        "qwen2_tied",
        dict(OPTION_RUN, loraplus=8, schedule="polynomial", schedule_kwargs='{"power": 2.0, "lr_end": 0.0001}', warmup=2, weight_decay=0.01),
    ),
    "label_smoothing": (
        "qwen2_tied",
        dict(OPTION_RUN, label_smoothing=0.1, schedule="warmup_stable_decay", schedule_kwargs='{"num_decay_steps": 5, "min_lr_ratio": 0.1}', warmup=3),
    ),
    "neftune": ("granite", dict(OPTION_RUN, neftune=15.0)),
    "dora": ("qwen2", dict(OPTION_RUN, quant="nf4", dora=True, loraplus=4, weight_decay=0.01)),
    "dora_dropout": ("granite", dict(OPTION_RUN, dora=True, dropout=0.2)),
    "trained_tokens": ("llama3", dict(OPTION_RUN, quant="nf4", tokens='{"embed_tokens": [1021, 13, 1022], "lm_head": [1023, 1021]}', weight_decay=0.01)),
    "trained_tokens_tied": ("gemma2", dict(OPTION_RUN, tokens="[510, 511]")),
    "adamw_8bit": ("qwen2_tied", dict(OPTION_RUN, optim="adamw_8bit", r=64, alpha=64, targets="q_proj,k_proj", weight_decay=0.01)),
}
"""More recorded runs of a fixture's checkpoint, in tests/golden/_variants: (fixture, arguments of run_ref.py)."""
