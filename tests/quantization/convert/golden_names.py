# SPDX-License-Identifier: Apache-2.0
"""Tensor names of published checkpoints, one layer of each kind, and what becomes of each.

A line is a name, its shape and "quantized", or why the matrix stays; "-" marks what is no matrix.
Sizes are small stand-ins with the proportions of the real ones.
"""

LLAMA = """
model.embed_tokens.weight 512x256 embedding
model.layers.0.self_attn.q_proj.weight 256x256 quantized
model.layers.0.self_attn.k_proj.weight 64x256 quantized
model.layers.0.self_attn.v_proj.weight 64x256 quantized
model.layers.0.self_attn.o_proj.weight 256x256 quantized
model.layers.0.self_attn.q_proj.bias 256 -
model.layers.0.mlp.gate_proj.weight 512x256 quantized
model.layers.0.mlp.up_proj.weight 512x256 quantized
model.layers.0.mlp.down_proj.weight 256x512 quantized
model.layers.0.input_layernorm.weight 256 -
model.layers.0.post_attention_layernorm.weight 256 -
model.norm.weight 256 -
lm_head.weight 512x256 output head
"""

QWEN3_MOE = """
model.embed_tokens.weight 512x256 embedding
model.layers.0.self_attn.q_proj.weight 512x256 quantized
model.layers.0.self_attn.k_proj.weight 128x256 quantized
model.layers.0.self_attn.v_proj.weight 128x256 quantized
model.layers.0.self_attn.o_proj.weight 256x512 quantized
model.layers.0.self_attn.q_norm.weight 64 -
model.layers.0.self_attn.k_norm.weight 64 -
model.layers.0.mlp.gate.weight 2x256 router or gate
model.layers.0.mlp.experts.0.gate_proj.weight 128x256 quantized
model.layers.0.mlp.experts.0.up_proj.weight 128x256 quantized
model.layers.0.mlp.experts.0.down_proj.weight 256x128 quantized
model.layers.0.mlp.experts.1.gate_proj.weight 128x256 quantized
model.layers.0.mlp.experts.1.up_proj.weight 128x256 quantized
model.layers.0.mlp.experts.1.down_proj.weight 256x128 quantized
model.layers.0.input_layernorm.weight 256 -
model.layers.0.post_attention_layernorm.weight 256 -
model.norm.weight 256 -
lm_head.weight 512x256 output head
"""

MIXTRAL = """
model.embed_tokens.weight 512x256 embedding
model.layers.0.self_attn.q_proj.weight 256x256 quantized
model.layers.0.self_attn.k_proj.weight 64x256 quantized
model.layers.0.self_attn.v_proj.weight 64x256 quantized
model.layers.0.self_attn.o_proj.weight 256x256 quantized
model.layers.0.block_sparse_moe.gate.weight 8x256 router or gate
model.layers.0.block_sparse_moe.experts.0.w1.weight 512x256 quantized
model.layers.0.block_sparse_moe.experts.0.w2.weight 256x512 quantized
model.layers.0.block_sparse_moe.experts.0.w3.weight 512x256 quantized
model.layers.0.input_layernorm.weight 256 -
model.norm.weight 256 -
lm_head.weight 512x256 output head
"""

# One decoder layer with an MLP, one with experts, and the layer behind the last, which is the
# multi-token prediction head.
DEEPSEEK_V3 = """
model.embed_tokens.weight 512x256 embedding
model.layers.0.self_attn.q_a_proj.weight 128x256 quantized
model.layers.0.self_attn.q_a_layernorm.weight 128 -
model.layers.0.self_attn.q_b_proj.weight 384x128 quantized
model.layers.0.self_attn.kv_a_proj_with_mqa.weight 96x256 quantized
model.layers.0.self_attn.kv_a_layernorm.weight 64 -
model.layers.0.self_attn.kv_b_proj.weight 512x64 quantized
model.layers.0.self_attn.o_proj.weight 256x256 quantized
model.layers.0.mlp.gate_proj.weight 512x256 quantized
model.layers.0.mlp.up_proj.weight 512x256 quantized
model.layers.0.mlp.down_proj.weight 256x512 quantized
model.layers.1.self_attn.q_a_proj.weight 128x256 quantized
model.layers.1.self_attn.kv_a_proj_with_mqa.weight 96x256 quantized
model.layers.1.mlp.gate.weight 4x256 router or gate
model.layers.1.mlp.gate.e_score_correction_bias 4 -
model.layers.1.mlp.experts.0.gate_proj.weight 128x256 quantized
model.layers.1.mlp.experts.0.up_proj.weight 128x256 quantized
model.layers.1.mlp.experts.0.down_proj.weight 256x128 quantized
model.layers.1.mlp.shared_experts.gate_proj.weight 128x256 quantized
model.layers.1.mlp.shared_experts.up_proj.weight 128x256 quantized
model.layers.1.mlp.shared_experts.down_proj.weight 256x128 quantized
model.layers.2.embed_tokens.weight 512x256 embedding
model.layers.2.enorm.weight 256 -
model.layers.2.hnorm.weight 256 -
model.layers.2.eh_proj.weight 256x512 multi-token prediction head
model.layers.2.self_attn.q_a_proj.weight 128x256 multi-token prediction head
model.layers.2.self_attn.kv_a_proj_with_mqa.weight 96x256 multi-token prediction head
model.layers.2.mlp.gate.weight 4x256 router or gate
model.layers.2.mlp.experts.0.gate_proj.weight 128x256 multi-token prediction head
model.layers.2.mlp.experts.0.up_proj.weight 128x256 multi-token prediction head
model.layers.2.mlp.experts.0.down_proj.weight 256x128 multi-token prediction head
model.layers.2.shared_head.norm.weight 256 -
model.layers.2.shared_head.head.weight 512x256 output head
model.norm.weight 256 -
lm_head.weight 512x256 output head
"""

# Gated linear attention in one layer, full attention in the next; fused experts; vision; MTP.
QWEN3_5 = """
model.language_model.embed_tokens.weight 512x256 embedding
model.language_model.layers.0.linear_attn.in_proj_qkv.weight 768x256 quantized
model.language_model.layers.0.linear_attn.in_proj_z.weight 256x256 quantized
model.language_model.layers.0.linear_attn.in_proj_a.weight 4x256 linear-attention state
model.language_model.layers.0.linear_attn.in_proj_b.weight 4x256 linear-attention state
model.language_model.layers.0.linear_attn.conv1d.weight 768x1x4 -
model.language_model.layers.0.linear_attn.A_log 4 -
model.language_model.layers.0.linear_attn.dt_bias 4 -
model.language_model.layers.0.linear_attn.norm.weight 64 -
model.language_model.layers.0.linear_attn.out_proj.weight 256x256 quantized
model.language_model.layers.0.mlp.gate.weight 2x256 router or gate
model.language_model.layers.0.mlp.experts.gate_up_proj 2x256x256 experts
model.language_model.layers.0.mlp.experts.down_proj 2x256x128 experts
model.language_model.layers.0.mlp.shared_expert.gate_proj.weight 128x256 quantized
model.language_model.layers.0.mlp.shared_expert.up_proj.weight 128x256 quantized
model.language_model.layers.0.mlp.shared_expert.down_proj.weight 256x128 quantized
model.language_model.layers.0.mlp.shared_expert_gate.weight 1x256 router or gate
model.language_model.layers.1.self_attn.q_proj.weight 512x256 quantized
model.language_model.layers.1.self_attn.k_proj.weight 64x256 quantized
model.language_model.layers.1.self_attn.v_proj.weight 64x256 quantized
model.language_model.layers.1.self_attn.o_proj.weight 256x256 quantized
model.language_model.layers.1.mlp.gate_proj.weight 512x256 quantized
model.language_model.layers.1.mlp.up_proj.weight 512x256 quantized
model.language_model.layers.1.mlp.down_proj.weight 256x512 quantized
model.language_model.norm.weight 256 -
model.visual.patch_embed.proj.weight 128x3x2x16x16 -
model.visual.blocks.0.attn.qkv.weight 384x128 vision or audio tower
model.visual.blocks.0.attn.proj.weight 128x128 vision or audio tower
model.visual.blocks.0.mlp.linear_fc1.weight 256x128 vision or audio tower
model.visual.merger.linear_fc1.weight 512x512 vision or audio tower
model.visual.pos_embed.weight 64x128 vision or audio tower
mtp.fc.weight 256x512 multi-token prediction head
mtp.layers.0.self_attn.q_proj.weight 512x256 multi-token prediction head
mtp.layers.0.mlp.gate_proj.weight 512x256 multi-token prediction head
lm_head.weight 512x256 output head
"""

GEMMA3 = """
language_model.model.embed_tokens.weight 512x256 embedding
language_model.model.layers.0.self_attn.q_proj.weight 256x256 quantized
language_model.model.layers.0.self_attn.k_proj.weight 64x256 quantized
language_model.model.layers.0.self_attn.v_proj.weight 64x256 quantized
language_model.model.layers.0.self_attn.o_proj.weight 256x256 quantized
language_model.model.layers.0.self_attn.q_norm.weight 64 -
language_model.model.layers.0.mlp.gate_proj.weight 512x256 quantized
language_model.model.layers.0.mlp.up_proj.weight 512x256 quantized
language_model.model.layers.0.mlp.down_proj.weight 256x512 quantized
language_model.model.layers.0.pre_feedforward_layernorm.weight 256 -
language_model.model.norm.weight 256 -
multi_modal_projector.mm_input_projection_weight 128x256 -
multi_modal_projector.mm_soft_emb_norm.weight 128 -
vision_tower.vision_model.embeddings.patch_embedding.weight 128x3x14x14 -
vision_tower.vision_model.embeddings.position_embedding.weight 64x128 vision or audio tower
vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight 128x128 vision or audio tower
vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight 256x128 vision or audio tower
"""

MODELS: dict[str, tuple[str, dict]] = {
    "llama": (LLAMA, {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 256}),
    "qwen3_moe": (
        QWEN3_MOE,
        {"model_type": "qwen3_moe", "num_hidden_layers": 1, "hidden_size": 256},
    ),
    "mixtral": (MIXTRAL, {"model_type": "mixtral", "num_hidden_layers": 1, "hidden_size": 256}),
    "deepseek_v3": (
        DEEPSEEK_V3,
        {"model_type": "deepseek_v3", "num_hidden_layers": 2, "hidden_size": 256},
    ),
    "qwen3_5": (
        QWEN3_5,
        {
            "model_type": "qwen3_5_moe",
            "text_config": {
                "model_type": "qwen3_5_moe_text",
                "num_hidden_layers": 2,
                "hidden_size": 256,
            },
        },
    ),
    "gemma3": (
        GEMMA3,
        {
            "model_type": "gemma3",
            "text_config": {
                "model_type": "gemma3_text",
                "num_hidden_layers": 1,
                "hidden_size": 256,
            },
        },
    ),
}
"""Name -> the lines, and the configuration beside them."""


def lines(text: str) -> list[tuple[str, tuple[int, ...], str]]:
    """Name, shape and what becomes of it."""
    found = []
    for line in text.strip().splitlines():
        name, shape, what = line.split(maxsplit=2)
        found.append((name, tuple(int(size) for size in shape.split("x")), what))
    return found
