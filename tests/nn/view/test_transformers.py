"""Models of transformers with what a tokenizer gives: masks, positions, lengths have values."""

from __future__ import annotations

import warnings

import pytest
import torch

import modelctl.nn as mnn

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

SMALL = {
    "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64,
    "vocab_size": 100,
}  # fmt: skip
GQA = {**SMALL, "num_key_value_heads": 1}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12], [5, 6, 7, 8, 9, 1, 1, 1]])
MASK = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
TEXT = {"input_ids": IDS, "attention_mask": MASK}
IMAGE = {"pixel_values": torch.ones(1, 3, 32, 32)}
MODELS = {
    "BertForSequenceClassification": ("BertConfig", SMALL, TEXT),
    "RobertaForMaskedLM": ("RobertaConfig", SMALL, TEXT),
    "DistilBertModel": ("DistilBertConfig",
                        {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64,
                         "vocab_size": 100}, TEXT),
    "DebertaV2Model": ("DebertaV2Config", SMALL, TEXT),
    "GPT2LMHeadModel": ("GPT2Config",
                        {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 100}, TEXT),
    "LlamaForCausalLM": ("LlamaConfig", GQA, TEXT),
    "MistralForCausalLM": ("MistralConfig", {**GQA, "sliding_window": 4}, TEXT),
    "Qwen2ForCausalLM": ("Qwen2Config", GQA, TEXT),
    "Gemma2ForCausalLM": ("Gemma2Config", {**GQA, "head_dim": 16}, TEXT),
    "PhiForCausalLM": ("PhiConfig", SMALL, TEXT),
    "MixtralForCausalLM": ("MixtralConfig", {**GQA, "num_local_experts": 2}, TEXT),
    "T5ForConditionalGeneration": ("T5Config",
                                   {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_layers": 2,
                                    "num_heads": 2, "vocab_size": 100},
                                   {**TEXT, "decoder_input_ids": IDS}),
    "BartForConditionalGeneration": ("BartConfig",
                                     {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
                                      "encoder_attention_heads": 2, "decoder_attention_heads": 2,
                                      "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
                                      "vocab_size": 100},
                                     TEXT),
    "ViTForImageClassification": ("ViTConfig", {**SMALL, "image_size": 32, "patch_size": 8}, IMAGE),
    "BeitForImageClassification": ("BeitConfig",
                                   {**SMALL, "image_size": 32, "patch_size": 8,
                                    "num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]}, IMAGE),
    "SwinForImageClassification": ("SwinConfig",
                                   {"image_size": 32, "patch_size": 2, "embed_dim": 16,
                                    "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
                                   IMAGE),
    "DetrForObjectDetection": ("DetrConfig",
                               {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
                                "encoder_attention_heads": 2, "decoder_attention_heads": 2,
                                "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_queries": 5,
                                "use_pretrained_backbone": False},
                               {"pixel_values": torch.ones(1, 3, 64, 64),
                                "pixel_mask": torch.ones(1, 64, 64, dtype=torch.long)}),
    "CLIPModel": ("CLIPConfig",
                  {"text_config": {**SMALL, "eos_token_id": 12, "pad_token_id": 1},
                   "vision_config": {**SMALL, "image_size": 32, "patch_size": 8}},
                  {**TEXT, "pixel_values": torch.ones(2, 3, 32, 32)}),
    "Wav2Vec2Model": ("Wav2Vec2Config",
                      {**SMALL, "conv_dim": [16, 16], "conv_stride": [5, 2], "conv_kernel": [10, 3],
                       "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
                      {"input_values": torch.ones(1, 800),
                       "attention_mask": torch.ones(1, 800, dtype=torch.long)}),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_the_same_macs_as_with_values(name):
    config, settings, inputs = MODELS[name]
    if not hasattr(transformers, name):
        pytest.skip("this transformers lacks it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()
        on_meta = mnn.summary(model, input_data=inputs)
        for_real = mnn.summary(model, input_data=inputs, device="cpu")
    assert on_meta.totals.macs == for_real.totals.macs > 0
    assert on_meta.output == for_real.output
    assert on_meta.uncounted == for_real.uncounted == []
    by_keyword = mnn.summary(model, input_data={}, **inputs)
    assert by_keyword.totals.macs == on_meta.totals.macs
