"""Tiny random checkpoints, written as the hub stores them: config, safetensors, image processor, tokenizer."""
import json

import torch

TEXTS = ["a photo of a cat", "a photo of a dog", "two cups of coffee on a table", "a rocket at night"]


def tokenizer(folder, kind, length):
    "A byte-level BPE trained on four captions, in CLIP's or in SigLIP's manner (pad to full length, end with </s>)."
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast
    start, end, unk, pad = "<|startoftext|>", "<|endoftext|>", "<unk>", "<pad>"
    tok = Tokenizer(models.BPE(unk_token=unk))
    tok.normalizer, tok.decoder = normalizers.Lowercase(), decoders.ByteLevel()
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=[pad, unk, start, end], initial_alphabet=alphabet)
    tok.train_from_iterator(TEXTS, trainer)
    ids = {k: tok.token_to_id(k) for k in (start, end)}
    single = f"{start} $A {end}" if kind == "clip" else f"$A {end}"
    tok.post_processor = processors.TemplateProcessing(single=single, special_tokens=list(ids.items()))
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, bos_token=start, eos_token=end, unk_token=unk, pad_token=pad,
                                   model_max_length=length)
    fast.save_pretrained(folder)
    return len(tok.get_vocab()), ids[start], ids[end], tok.token_to_id(pad)


def hf(kind, folder, seed=0):
    "Write a tiny transformers checkpoint of this kind into `folder`, and return the model."
    import transformers as t
    torch.manual_seed(seed)
    v = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8)
    if kind in ("clip", "siglip", "siglip2"):
        vocab, bos, eos, pad = tokenizer(folder, "clip" if kind == "clip" else "siglip", 16)
        x = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=vocab,
                 max_position_embeddings=16, bos_token_id=bos, eos_token_id=eos, pad_token_id=pad)
    stretch = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3, size={"height": 32, "width": 32}, do_resize=True, resample=3,
                   do_rescale=True, rescale_factor=1 / 255, do_normalize=True)
    crop = dict(stretch, size={"shortest_edge": 36}, do_center_crop=True, crop_size={"height": 32, "width": 32})
    if kind == "clip":
        model = t.CLIPModel(t.CLIPConfig(text_config=x, vision_config=v, projection_dim=24))
        processor = dict(crop, image_processor_type="CLIPImageProcessor", image_mean=[0.48145466, 0.4578275, 0.40821073],
                         image_std=[0.26862954, 0.26130258, 0.27577711])
    elif kind == "siglip":
        model = t.SiglipModel(t.SiglipConfig(text_config=x, vision_config=v))
        processor = dict(stretch, image_processor_type="SiglipImageProcessor")
    elif kind == "siglip2":
        v = {k: o for k, o in v.items() if k != "image_size"} | dict(num_patches=16)
        model = t.Siglip2Model(t.Siglip2Config(text_config=x, vision_config=v))
        processor = dict(image_processor_type="Siglip2ImageProcessor", image_mean=[0.5] * 3, image_std=[0.5] * 3,
                         max_num_patches=16, patch_size=8, do_resize=True, resample=2, do_rescale=True,
                         rescale_factor=1 / 255, do_normalize=True)
    else:
        four = dict(num_register_tokens=4)
        config, net, extra = {"dinov2": (t.Dinov2Config, t.Dinov2Model, {}), "vit": (t.ViTConfig, t.ViTModel, {}),
                              "dinov2_with_registers": (t.Dinov2WithRegistersConfig, t.Dinov2WithRegistersModel, four),
                              "dinov3_vit": (t.DINOv3ViTConfig, t.DINOv3ViTModel, four)}[kind]
        if kind.startswith("dinov2"): v = dict(v, mlp_ratio=2)
        model = net(config(**v, **extra))
        processor = dict(crop if kind.startswith("dinov2") else stretch,
                         image_processor_type="BitImageProcessor" if kind.startswith("dinov2") else "ViTImageProcessor")
    with torch.no_grad():                                      # initial biases are zero and would hide a mistake
        for p in model.parameters(): p.add_(0.02 * torch.randn_like(p))
        if kind.startswith("siglip"): model.logit_scale.fill_(4.6052), model.logit_bias.fill_(-10.0)
    model.eval().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model
