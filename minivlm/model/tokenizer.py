"""Loading a tokenizer and encoding plain text with it. Below `data`, because exports carry their tokenizer.

Everything else imports these names from `minivlm.data.tokenizer`.
"""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from minivlm.schema import IMAGE_PLACEHOLDER

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END, IMAGE_PLACEHOLDER)

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}{{ part['text'] }}{%- else -%}{{ '<image>\\n' }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Load a tokenizer from a folder or hub id and make sure that it speaks ChatML with pictures.

    A foreign tokenizer gets the special tokens that it lacks; the language model's embedding must then have
    len(tokenizer) rows (`build_language_model` sees to that).

    Raises:
        ValueError: there is no fast tokenizer under `path`, or plain text can become a control token in it.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), use_fast=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No tokenizer under `{path}` ({str(error).splitlines()[0]}). Type tokenizer.path=FOLDER of a "
            "tokenizer.json, or leave tokenizer.path out to train one"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"The tokenizer under `{path}` has no tokenizer.json, so `{IMAGE_PLACEHOLDER}` cannot be added safely. "
            "Save it with a fast tokenizer, or leave tokenizer.path out to train one"
        )
    known = set(tokenizer.all_special_tokens)
    missing = [token for token in SPECIAL_TOKENS if token not in known]
    if missing:
        tokenizer.add_special_tokens({"extra_special_tokens": missing}, replace_extra_special_tokens=False)
    tokenizer.pad_token = END_OF_TEXT
    tokenizer.eos_token = TURN_END
    tokenizer.chat_template = CHAT_TEMPLATE
    _check_no_forgery(tokenizer, path)
    return tokenizer


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Ids of `text` as plain text: a special string inside it is spelled out, never a control token."""
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    ids: list[int] = backend.encode(text, add_special_tokens=False).ids
    return ids


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """Id of one special token (`load_tokenizer` made sure that it exists)."""
    number = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(number, int), token
    return number


def _check_no_forgery(tokenizer: PreTrainedTokenizerFast, path: str | Path) -> None:
    special_ids = {token_id(tokenizer, token) for token in SPECIAL_TOKENS}
    for token in SPECIAL_TOKENS:
        if not special_ids.isdisjoint(encode_text(tokenizer, token)):
            raise ValueError(
                f"The tokenizer under `{path}` turns the plain text {token!r} into a control token, so any user could "
                "forge a turn. Use another tokenizer, or leave tokenizer.path out to train one"
            )
