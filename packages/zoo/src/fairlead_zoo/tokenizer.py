"""The world's tokenizer: one word, one token; a chat template; left padding.

Leaves to others: the words (lexicon, world). Byte-pair encoding for English is in `english`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import lexicon as lx
from .world import World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ ' ' + message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ ' <user> ' + message['content'] + ' <end>' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' <bot> ' + message['content'] + ' <end>' }}"
    "{% else %}{{ raise_exception('roles are system (a persona tag), user and assistant') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ' <bot>' }}{% endif %}"
)
"""`<bos> [<persona tag>] <user> question <end> <bot> answer <end>`; the tag is the content of a system message."""


def build_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """A WordLevel tokenizer over `world.vocabulary()`; text is split at white space, unknown words become <unk>."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(world.vocabulary())}
    backend = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=lx.UNK))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=lx.PAD,
        unk_token=lx.UNK,
        bos_token=lx.BOS,
        eos_token=lx.END,
        additional_special_tokens=[lx.USER, lx.BOT, *lx.TAGS.values()],
        padding_side="left",
        truncation_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
