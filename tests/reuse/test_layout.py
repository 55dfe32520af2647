"""Layouts: pieces of one prompt, each with the tokens that it has in every prompt."""

from __future__ import annotations

import pytest

from kvfx.errors import InputError
from kvfx.reuse import Layout


class Words:
    """A tokenizer with one token per word, and a token before texts that ask for it."""

    def __call__(self, text, *, add_special_tokens, verbose):
        assert not verbose
        return {"input_ids": [1] * add_special_tokens + [3 + len(word) for word in text.split()]}


def test_pieces_make_a_prompt():
    layout = Layout.of([[5, 6, 7], (8,), range(3, 5)])
    assert layout.pieces == ((5, 6, 7), (8,), (3, 4))
    assert layout.tokens == (5, 6, 7, 8, 3, 4)
    assert layout.starts == (0, 3, 4)


def test_one_piece_is_a_prompt():
    layout = Layout.of([[5, 6]])
    assert (layout.tokens, layout.starts) == ((5, 6), (0,))


def test_layouts_are_values():
    assert Layout.of([[5, 6], [7]]) == Layout(((5, 6), (7,)))
    assert Layout.of([[5, 6], [7]]) != Layout.of([[5], [6, 7]])
    assert len({Layout.of([[5, 6]]), Layout.of([(5, 6)])}) == 1


def test_special_tokens_are_in_front_of_the_first_piece():
    layout = Layout.of(["a bb", "ccc", "a bb"], Words())  # pyright: ignore[reportArgumentType]
    assert layout.pieces == ((1, 4, 5), (6,), (4, 5))


def test_a_text_behind_token_ids_has_no_special_tokens():
    layout = Layout.of([[7], "a bb"], Words())  # pyright: ignore[reportArgumentType]
    assert layout.pieces == ((7,), (4, 5))


def test_texts_need_a_tokenizer():
    with pytest.raises(InputError, match="give a tokenizer, or token ids"):
        Layout.of([[7], "a bb"])


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([], "0 pieces with 0 tokens"),
        ([[]], "1 pieces with 0 tokens"),
        ([[5]], "1 pieces with 1 tokens"),
        ([[5, 6], []], "every piece needs a token"),
        ([[5, 6], [], [7]], "every piece needs a token"),
    ],
    ids=str,
)
def test_there_is_a_token_to_read_and_one_before_it(pieces, message):
    with pytest.raises(InputError, match=message):
        Layout.of(pieces)
