"""What is TransformerLens's own, in a form that can be sent upstream; stands at the end of `docs/architectures.md`."""

UPSTREAM = """## TransformerLens's own

Found with transformer-lens 4.3.0 and transformers 5.23.0. Each is shown by `python docs/architectures.py --only NAME`;
the models are `tests/architectures/zoo.py`'s, which need nothing else.

- **Falcon with `multi_query=True, parallel_attn=True` (the 7B form): logits are not the model's.**
  `TransformerBridge.boot_transformers(hf_model=FalconForCausalLM(FalconConfig(multi_query=True, parallel_attn=True,
  num_attention_heads=4, hidden_size=32, ...)))` gives logits off by 2.9 of 4.9, as soon as biases and norms are not at
  their initial values. With ALiBi and `multi_query=False` they agree. (`--only Falcon`)
- **Falcon with `new_decoder_architecture=True` (40B) can't be opened**: `split_with_sizes expects split_sizes to sum
  exactly to 64 ..., but got split_sizes=[32, 8, 8]`. The fused projection is grouped as [queries, key, value] by key
  head. (`--only "Falcon, new decoder"`)
- **GraniteMoeHybrid without rotary positions (its default)**: `Original component not set for model.rotary_emb` on the
  first forward pass, since the module exists with `position_embedding_type="rope"` alone.
  (`--only "Granite MoE hybrid"`)
- **Multi-head latent attention: `attn.hook_z` is [batch, position, d_model / d_head, d_head] with `cfg.d_head` the
  rotated part of a key**, so for 4 heads of 8 values and a rotated part of 4 it is [3, 20, 8, 4]: its third dimension
  is not heads. Expected: [batch, position, n_heads, v_head_dim]. `hook_q`, `hook_k` and `hook_v` are [batch, head,
  position, width] there, and [batch, position, head, width] everywhere else. (`--only DeepSeek-V3`)
- **GPT-1: blocks return a list, so `hook_resid_post` gets a list**, and hooks that expect a tensor fail; and **with
  any `attention_mask` the causal mask is dropped**: queries see later keys. (`--only GPT-1`)
- **`PhiMoEForCausalLM` in the registry is `PhimoeForCausalLM` in transformers**, so that no checkpoint is recognised.
  (`--only PhiMoE`)
- **RecurrentGemma, Zamba2 and Nemotron-H: layers that attend have no `attn` submodule**, so no `hook_pattern`,
  `hook_z` or W_O; in RecurrentGemma no hook lies between a block's input and its output. Bamba, Jamba, LFM2,
  Qwen3-Next and OLMo-Hybrid have them. (`--only "RecurrentGemma; Zamba2; Nemotron-H"`)
- **JetMoE: `attn` has neither `hook_z` nor W_O.** (`--only JetMoE`)
- **Where attention is left to transformers (GPT-J, Gemma 4, Llama 4, NanoChat, AFMoE, Laguna, OLMo-Hybrid, BERT, OPT)
  `hook_pattern` fires after `hook_z` and `hook_attn_out`**: it tells of the pattern, an edit there changes nothing, and
  no hook carries rotated queries and keys.
- **`cfg` leaves out what scores and streams are multiplied by** (`residual_multiplier` and `attention_multiplier` of
  Granite, `query_pre_attn_scalar` of Gemma), which then has to be read of the wrapped model's config.
"""
