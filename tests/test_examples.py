"""Words, conversations, regions and the one way to decode an image."""

import io
import struct
import zlib

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.examples import (
    Example,
    ImageError,
    InvalidExample,
    Turn,
    Word,
    decode,
    inspect_image,
    parse_turns,
    words,
)
from pipeline.regions import check_regions, decode_rle, encode_rle, region_mask


def said(text):
    return [text[start:end] for start, end in words(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A red circle, left of it.", ["A", "red", "circle", "left", "of", "it"]),
        ("can't won’t rock'n'roll", ["can't", "won’t", "rock'n'roll"]),
        ("a well-known x‑ray 2020-21", ["a", "well-known", "x‑ray", "2020-21"]),
        ("wait--no a - b -c d-", ["wait", "no", "a", "b", "c", "d"]),
        ("3.14 and 1,000 items", ["3.14", "and", "1,000", "items"]),
        ("东京塔 is 高い", ["东", "京", "塔", "is", "高", "い"]),
        ("日-本", ["日", "本"]),
        ("カタカナ 한국어 नमस्ते", ["カタカナ", "한국어", "नमस्ते"]),
        ("ok 👍🏽 👩‍👧 1️⃣ 🇫🇷 …!?", ["ok"]),
        ("<b>bold</b> <|im_end|> &amp; a < b, x <3", ["bold", "a", "b", "x", "3"]),
        ("_very_ **good** a_b", ["very", "good", "a_b"]),
        ("e\u0301te\u0301", ["e\u0301te\u0301"]),
        ("", []),
        (" \n\t", []),
        ("...", []),
    ],
)
def test_words(text, expected):
    assert said(text) == expected


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_words_are_ordered_spans_without_space_at_the_ends(text):
    previous = 0
    for start, end in words(text):
        assert previous <= start < end <= len(text)
        assert text[start:end].strip("_ \n\t") == text[start:end]
        assert regex.search(r"[\p{L}\p{N}]", text[start:end])
        previous = end


def test_words_of_an_example_keep_repeats_apart():
    turns = (Turn("system", "Be brief."), Turn("user", "the dog or the cat?"), Turn("assistant", "the cat"))
    example = Example("0000000000", None, "", turns, "t", "train", "", {})
    assert example.words(["assistant"]) == [Word(2, 0, 3), Word(2, 4, 7)]
    assert [example.word_text(word) for word in example.words()].count("the") == 3
    assert all(word.turn != 0 for word in example.words())


# --- conversations ---


def llava(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<image>\nWhat?", "What?"),
        ("What?\n<image>", "What?"),
        ("Look <image> here", "Look here"),
        ("a\n<image>\nb", "a\nb"),
        ("What?", "What?"),
        ("<image>", ""),
    ],
)
def test_the_marker_is_removed(text, expected):
    assert parse_turns(llava(text, "This."), True)[0] == ("user", expected)


def test_chat_form_and_system_turn():
    turns = parse_turns(
        [
            {"role": "system", "content": "S"},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]},
            {"role": "assistant", "content": " A "},
        ],
        True,
    )
    assert turns == (("system", "S"), ("user", "Q"), ("assistant", "A"))


@pytest.mark.parametrize(
    ("conversation", "image", "status"),
    [
        ([], True, "empty_conversation"),
        (None, True, "empty_conversation"),
        (llava("Q", "  "), True, "empty_conversation"),
        (llava("<image>", "A", "", "B"), True, "empty_conversation"),
        (llava("Q"), True, "bad_conversation"),
        ([{"from": "gpt", "value": "A"}], True, "bad_conversation"),
        ([*llava("Q", "A"), {"from": "gpt", "value": "B"}], True, "bad_conversation"),
        ([{"from": "system", "value": "S"}], True, "bad_conversation"),
        ([*llava("Q", "A"), {"from": "system", "value": "B"}], True, "bad_conversation"),
        ([{"from": "robot", "value": "A"}], True, "bad_conversation"),
        ([{"from": ["a"], "value": "A"}], True, "bad_conversation"),
        ([{"from": "human", "value": 3}], True, "bad_conversation"),
        (["Q", "A"], True, "bad_conversation"),
        (llava("Q\0", "A"), True, "bad_text"),
        (llava("Q", "half \ud83d"), True, "bad_text"),
        (llava("Q" * 300, "A"), True, "bad_text"),
        (llava("<image>Q", "A"), False, "missing_image"),
        (llava("<image><image>Q", "A"), True, "unsupported"),
        (llava("Q", "A", "<image>", "B"), True, "unsupported"),
        (llava("<video>Q", "A"), False, "unsupported"),
    ],
)
def test_bad_conversations(conversation, image, status):
    with pytest.raises(InvalidExample) as caught:
        parse_turns(conversation, image, max_chars=200)
    assert caught.value.status == status
    assert caught.value.reason


# --- images ---


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def two_halves(mode="RGB", left="black", right="white"):
    image = Image.new(mode, (8, 4), left)
    image.paste(right, (4, 0, 8, 4))
    return image


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG"])
def test_formats_are_named_by_content(kind):
    data = encoded(two_halves(), kind)
    image = decode(data)
    assert (image.mode, image.size) == ("RGB", (8, 4))
    assert inspect_image(data)[1:] == inspect_image(data, whole=False)[1:] == (8, 4)
    assert inspect_image(data)[0] == {"JPEG": "jpg", "TIFF": "tif"}.get(kind, kind.lower())
    left, right = image.getpixel((0, 0)), image.getpixel((7, 3))
    assert max(left) < 16
    assert min(right) > 239


def test_modes():
    grey16 = Image.fromarray(np.array([[0, 128 * 257, 65535]], np.uint16))
    assert [p[0] for p in np.asarray(decode(encoded(grey16, "PNG"))).reshape(-1, 3)] == [0, 128, 255]
    ink = decode(encoded(two_halves("CMYK", (0, 0, 0, 255), (0, 0, 0, 0)), "JPEG"))
    assert max(ink.getpixel((0, 0))) < 16 < 239 < min(ink.getpixel((7, 0)))
    assert decode(encoded(two_halves().convert("P"), "PNG")).getpixel((7, 0)) == (255, 255, 255)
    assert decode(encoded(two_halves().convert("1"), "PNG")).getpixel((0, 0)) == (0, 0, 0)
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 128))
    assert decode(encoded(half, "PNG")).getpixel((0, 0)) == (127, 127, 127)
    assert decode(encoded(Image.new("LA", (1, 1), (0, 0)), "PNG")).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (1, 1), 0)
    assert decode(encoded(palette, "PNG", transparency=0)).getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(ImageError, match="floating"):
        decode(encoded(Image.new("F", (2, 2)), "TIFF"))


def test_first_frame_and_exif():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    animated = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(animated).getpixel((0, 0)) == (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter clockwise: what is left becomes top
    turned = encoded(two_halves(), "PNG", exif=exif)
    assert decode(turned).size == (4, 8)
    assert decode(turned).getpixel((0, 0)) == (0, 0, 0)
    assert inspect_image(turned) == inspect_image(turned, whole=False) == ("png", 4, 8)


def test_broken_images():
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8))
    for kind in ("PNG", "JPEG", "GIF", "WEBP"):
        data = encoded(noise, kind)
        with pytest.raises(ImageError):
            decode(data[: len(data) // 2])
    for data in (b"", b"not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\x89PNG\r\n\x1a\n"):
        with pytest.raises(ImageError) as caught:
            decode(data)
        assert "0x" not in str(caught.value)
    with pytest.raises(ImageError, match="8x4 pixels"):
        decode(encoded(two_halves(), "PNG"), max_pixels=31)
    small = encoded(two_halves(), "PNG")
    claim = b"IHDR" + struct.pack(">II", 60_000, 60_000) + small[24:29]  # a bomb says so in its header
    with pytest.raises(ImageError, match="pixels"):
        decode(small[:12] + claim + struct.pack(">I", zlib.crc32(claim)) + small[33:])


def test_the_quick_check_of_a_jpeg_finds_what_decoding_it_finds():
    """`inspect_image` decodes at an eighth of the size; its verdict, and its words, are those of the whole image."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (12, 19, 3), np.uint8)).resize((153, 97), Image.Resampling.BICUBIC)
    forms = [
        encoded(picture, "JPEG"), encoded(picture, "JPEG", progressive=True), encoded(picture.convert("L"), "JPEG"),
        encoded(picture.convert("CMYK"), "JPEG"), encoded(picture.crop((0, 0, 5, 3)), "JPEG", subsampling=0),
        encoded(picture, "JPEG", restart_marker_rows=1),
    ]  # fmt: skip

    def verdict(check, data):
        try:
            check(data)
        except ImageError as error:
            return str(error)
        return "sound"

    found = set()
    for data in forms:
        assert inspect_image(data)[1:] == decode(data).size
        for number in range(24):
            changed = bytearray(data)
            if number % 2:
                changed = changed[: int(rng.integers(1, len(data)))]
            else:
                changed[int(rng.integers(2, len(data)))] = int(rng.integers(256))
            found.add(verdict(inspect_image, bytes(changed)))
            assert verdict(inspect_image, bytes(changed)) == verdict(decode, bytes(changed))
    assert "sound" in found and len(found) > 10


# --- regions ---


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_run_lengths(height, width, seed):
    mask = np.random.default_rng(seed).random((height, width)) < 0.5
    rle = encode_rle(mask)
    assert sum(rle["counts"]) == height * width
    assert np.array_equal(decode_rle(rle), mask)
    assert np.array_equal(region_mask({"rle": rle}, (height, width)), mask)


def test_run_lengths_are_column_major_and_begin_with_zeros():
    assert encode_rle(np.array([[1, 0], [1, 1]]))["counts"] == [0, 2, 1, 1]
    assert encode_rle(np.zeros((2, 2)))["counts"] == [4]


def test_region_masks():
    mask = region_mask({"boxes": [[0, 0, 0.5, 1], [0.9, 0.9, 1, 1]]}, (4, 4))
    assert mask[:, :2].all()
    assert not mask[:, 2:].any()
    coarse = encode_rle(np.array([[True, False]]))
    assert np.array_equal(region_mask({"rle": coarse}, (2, 4)), np.array([[1, 1, 0, 0]] * 2, bool))


@pytest.mark.parametrize(
    "region",
    [
        {"turn": 1, "start": 0, "end": 1, "boxes": [[0, 0, 1, 1]]},
        {"turn": 0, "start": 2, "end": 2, "boxes": [[0, 0, 1, 1]]},
        {"turn": 0, "start": 0, "end": 9, "boxes": [[0, 0, 1, 1]]},
        {"turn": 0, "start": 0, "end": 1, "boxes": [[0, 0, 2, 1]]},
        {"turn": 0, "start": 0, "end": 1, "rle": {"size": [2, 2], "counts": [3]}},
        {"turn": 0, "start": 0, "end": 1},
        "red",
    ],
)
def test_bad_regions(region):
    with pytest.raises(ValueError, match="region 0"):
        check_regions([region], ["word"])
