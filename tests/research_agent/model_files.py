"""Small checkpoints of every common kind, written to disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from tests.research_agent.conftest import byte_tokenizer


def save_model(folder: Path, model: Any, **options: Any) -> Path:
    """Write a model with its tokenizer."""
    model.save_pretrained(folder, **options)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_adapter(folder: Path, base: Path, rank: int = 4, **options: Any) -> Path:
    """Write a LoRA adapter that is not zero, over the model of a folder."""
    torch.manual_seed(1)
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"target_modules": "all-linear", "init_lora_weights": False, **options}
    get_peft_model(model, LoraConfig(r=rank, **settings)).save_pretrained(str(folder))
    edit_json(folder / "adapter_config.json", base_model_name_or_path=str(base))
    return folder


def edit_json(path: Path, **values: Any) -> None:
    """Set values in a JSON file."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**found, **values}), encoding="utf-8")


def save_gguf(path: Path, model: LlamaForCausalLM) -> Path:
    """Write a Llama as llama.cpp's converter does: matrices in 8 bits, with its tokenizer."""
    config, tokenizer = model.config, byte_tokenizer(merges=True)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    backend = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    words = tokenizer.convert_ids_to_tokens(range(config.vocab_size))
    writer.add_token_list(words)
    special = set(tokenizer.all_special_tokens)
    writer.add_token_types([3 if word in special else 1 for word in words])
    writer.add_token_merges([" ".join(pair) for pair in backend["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm", "model.layers": "blk",
    }  # fmt: skip
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        written = name
        for ours, theirs in names.items():
            written = written.replace(ours, theirs)
        array = weight.numpy()
        for kind, count in heads.items():
            if f".{kind}." in written:  # llama.cpp rotates neighbors, transformers halves
                rows, columns = array.shape
                array = array.reshape(count, 2, rows // count // 2, columns)
                array = array.swapaxes(1, 2).reshape(rows, columns)
        if array.ndim == 1 or array.shape[1] % 32:  # blocks of 32 numbers
            writer.add_tensor(written, array)
            continue
        kind8 = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(written, gguf.quants.quantize(array, kind8), raw_dtype=kind8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
