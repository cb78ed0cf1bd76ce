"""Tokenizer: byte-level BPE with ChatML markers and the `<image>` placeholder, trained here or brought by the user.

Called by the tokenizer job and by everything that turns text into ids.
"""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from minivlm.model.tokenizer import (
    CHAT_TEMPLATE,
    END_OF_TEXT,
    SPECIAL_TOKENS,
    TURN_END,
    TURN_START,
    encode_text,
    load_tokenizer,
    token_id,
)
from minivlm.schema import IMAGE_PLACEHOLDER

__all__ = [
    "END_OF_TEXT",
    "SPECIAL_TOKENS",
    "TURN_END",
    "TURN_START",
    "encode_text",
    "load_tokenizer",
    "token_id",
    "train_tokenizer",
]

NUM_BYTES = 256
HAN = r"\p{Han}"


def train_tokenizer(texts: Iterable[str], vocab_size: int, out_dir: Path) -> PreTrainedTokenizerFast:
    """Learn byte-pair merges from `texts` and save the tokenizer with its chat template.

    Digits stay single tokens, so that numbers of any length are spelled the same way, and so do Chinese characters:
    there are no spaces between them, so a small corpus would make whole phrases one token each. Special strings inside
    the texts are blanked first: a merge that spelled one would let plain text become a control token.

    Args:
        texts: the corpus, one turn each with its header (`user\\n..`), so that headers become short too.
        vocab_size: upper bound of entries, the 256 bytes and the four special tokens included. A small corpus
            gives fewer.
        out_dir: folder to write (tokenizer.json, tokenizer_config.json, chat_template.jinja).

    Raises:
        ValueError: vocab_size has no room for the bytes and the special tokens.
    """
    smallest = NUM_BYTES + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(
            f"tokenizer.vocab_size is {vocab_size}, but the 256 bytes and the special tokens need {smallest}: "
            f"type tokenizer.vocab_size={smallest} or more"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(Regex(HAN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((_without_specials(text) for text in texts), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=END_OF_TEXT,
        eos_token=TURN_END,
        extra_special_tokens=[TURN_START, IMAGE_PLACEHOLDER],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
    wrapped.save_pretrained(str(out_dir))
    return load_tokenizer(out_dir)


def _without_specials(text: str) -> str:
    for token in SPECIAL_TOKENS:
        text = text.replace(token, " ")
    return text
