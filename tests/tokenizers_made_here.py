"""Small tokenizers of every kind that prompts must cope with, made here."""

from __future__ import annotations

from conftest import CHAT_TEMPLATE
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}"
    "<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
INST_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST] "
    "{{ message['content'] }} [/INST]{% else %} {{ message['content'] }}</s>{% endif %}{% endfor %}"
)


def byte_level(
    chat_template=CHAT_TEMPLATE, control=("<|im_start|>", "<|im_end|>"), plain=(), bos=False, **options
):
    """Make a tokenizer with a token a byte; ``plain`` are added tokens that are not special."""
    special = ["<pad>", "<s>", "</s>", *control]
    vocab = {
        token: i for i, token in enumerate([*special, *plain, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, **options)
    tokenizer.decoder = decoders.ByteLevel()
    return _finish(tokenizer, special, plain, bos, chat_template)


def metaspace(
    chat_template=CHAT_TEMPLATE, scheme="first", bos=True, unigram=False, normalizer=None, plain=()
):
    """Make a tokenizer that puts a space before a text, as SentencePiece does, with bytes to fall back on."""
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    words = ["\u2581", "\u2581th", "th", "\u2581a", "e", "a", "t", "h", "b"]
    pieces = ["<unk>", *special, *plain, *words, *(f"<0x{byte:02X}>" for byte in range(256))]
    if unigram:
        model = models.Unigram(
            [(piece, 0.0 if piece in special else -3.0) for piece in pieces], 0, byte_fallback=True
        )
    else:
        vocab = {piece: index for index, piece in enumerate(pieces)}
        merges = [("t", "h"), ("\u2581", "th"), ("\u2581", "a")]
        model = models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=unigram)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _finish(tokenizer, special, plain, bos, chat_template)


def lowercasing(plain=("<tool_call>",)):
    """Make a tokenizer that normalizes a text into an added token that was not spelled in it."""
    made = byte_level(plain=plain)
    made.backend_tokenizer.normalizer = normalizers.Lowercase()
    return made


def _finish(tokenizer, special, plain, bos, chat_template):
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=True) for token in plain])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )
