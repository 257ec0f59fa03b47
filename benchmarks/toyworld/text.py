"""A word-level tokenizer of the captions' vocabulary and a tiny UMT5 encoder."""

from __future__ import annotations

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from benchmarks.toyworld import world

PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"
CAPTION_TOKENS = 8  # seven words and the end mark
WIDTH = 48


def vocabulary() -> dict[str, int]:
    """Return every word of every caption, behind the special tokens."""
    words = sorted({word for scene in world.SCENES for word in scene.caption.split()})
    return {word: index for index, word in enumerate([PAD, EOS, UNKNOWN, *words])}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer of lower-cased words, with an end mark and padding on the right."""
    vocab = vocabulary()
    raw = Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, vocab[EOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="right",
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
    )


def build_encoder() -> UMT5EncoderModel:
    """Build the stock class at about 50 k parameters."""
    config = UMT5Config(
        vocab_size=len(vocabulary()),
        d_model=WIDTH,
        d_kv=16,
        num_heads=3,
        d_ff=96,
        num_layers=2,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=32,
    )
    return UMT5EncoderModel(config)
