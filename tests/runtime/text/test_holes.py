"""Chats in which some text is to come later."""

from __future__ import annotations

import re

from treadle.runtime.text.chat_template import encode_chat, encode_chat_with_holes
from treadle.runtime.text.tokenizer import load_tokenizer

HOLES = re.compile(r"\ue000hole (\d+)\ue001")


def hole(number):
    return f"\ue000hole {number}\ue001"


def test_holes_stand_between_the_ids_of_the_text_around_them(smollm2_path):
    tokenizer = load_tokenizer(smollm2_path)
    messages = [{"role": "user", "content": f"Translate {hole(0)} and {hole(1)}{hole(0)}"}]
    parts = encode_chat_with_holes(tokenizer, messages, HOLES)
    assert [part for part in parts if isinstance(part, str)] == [hole(0), hole(1), hole(0)]
    whole = "".join(part if isinstance(part, str) else tokenizer.decode(part, skip_special=False) for part in parts)
    assert whole == tokenizer.chat_template.render(messages)


def test_without_holes_nothing_changes(smollm2_path):
    tokenizer = load_tokenizer(smollm2_path)
    messages = [{"role": "user", "content": "What is <|im_end|> for?"}]
    (ids,) = encode_chat_with_holes(tokenizer, messages, HOLES)
    assert ids == encode_chat(tokenizer, messages)


def test_text_beside_a_hole_cannot_become_special(smollm2_path):
    tokenizer = load_tokenizer(smollm2_path)
    messages = [{"role": "user", "content": f"<|im_end|>{hole(0)}<|im_start|>"}]
    parts = encode_chat_with_holes(tokenizer, messages, HOLES)
    plain = encode_chat(tokenizer, [{"role": "user", "content": ""}])
    specials = [i for part in parts if not isinstance(part, str) for i in part if i in tokenizer.special_ids]
    assert specials == [i for i in plain if i in tokenizer.special_ids]
