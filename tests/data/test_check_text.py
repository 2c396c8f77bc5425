"""Damaged text, scripts and secrets by their characters; what only looks like them is left alone."""

import re
from re import _parser  # type: ignore[attr-defined]

import pytest

from gemma_ft.data.check.anomalies import CONTROL, MOJIBAKE, PRIVATE_USE, damage, script
from gemma_ft.system.redact import EMAIL, PRIVATE_KEY, secret_kinds

HF, GITHUB, AWS = "hf_" + "aB3" * 10, "ghp_" + "aB3" * 10, "AKIA" + "Z9" * 8
KEY = "-----BEGIN {}PRIVATE KEY-----\n" + "MIIEowIBAAKCAQEA" * 5
WORDS = [
    "café",
    "l’été",
    "don’t",
    "only 5 €",
    "naïve – “quoted”",
    "Привет, мир",
    "你好,世界",
    "emoji 🙂",
    "¿Qué?",
    "Größe",
    "ελληνικά",
    "한국어",
]


@pytest.mark.parametrize(
    "text", [*WORDS, "tab\tline\r\nend", "NÃO, IRMÃO", "Âge", "À “Ça”", "Spaß“", "zero\u200bwidth"]
)
def test_sound_text_is_left_alone(text: str) -> None:
    assert damage(text) == []


@pytest.mark.parametrize("text", WORDS)
@pytest.mark.parametrize("wrong", ["latin-1", "cp1252"])
def test_utf8_that_was_read_as_something_else_is_seen(text: str, wrong: str) -> None:
    bytes_read = [bytes([byte]) for byte in text.encode()]
    garbled = "".join(byte.decode(wrong, errors="ignore") or chr(byte[0]) for byte in bytes_read)  # as browsers do it
    assert "mojibake" in damage(garbled)


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("lost \ufffd", ["replacement_character"]),
        ("\x1b[31mred", ["control_character"]),
        ("page\x0cbreak", ["control_character"]),
        ("a mark\ufeff inside", ["control_character"]),
        ("turned \u202earound", ["control_character"]),
        ("bullet \uf0b7", ["private_use"]),
        ("far \U000f1234", ["private_use"]),
        ("\x07 \ufffd Ã© \ue000", ["control_character", "replacement_character", "mojibake", "private_use"]),
    ],
)
def test_damage_is_named(text: str, kinds: list[str]) -> None:
    assert damage(text) == kinds


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("What is the capital?", "LATIN"),
        ("Où est la bibliothèque, s’il vous plaît ?", "LATIN"),
        ("Как пройти в библиотеку? (OK)", "CYRILLIC"),
        ("日本語の文章をここに書きます", "CJK"),
        ("한국어 문장을 씁니다 여기에", "HANGUL"),
        ("12 + 30 = 42", None),
        ("Да", None),
        ("", None),
    ],
)
def test_the_script_is_that_of_most_letters(text: str, name: str | None) -> None:
    assert script(text) == name


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        (f"login with {HF} now", ["access_token"]),
        (f"token={GITHUB}", ["access_token"]),
        (AWS, ["access_token"]),
        (AWS.replace("AKIA", "ASIA"), ["access_token"]),
        ("github_pat_" + "11ABCDEFG0" * 3, ["access_token"]),
        ("glpat-" + "aB3-" * 5 + "x", ["access_token"]),
        ("wandb_" + "v1x" * 8, ["access_token"]),
        (KEY.format(""), ["private_key"]),
        (KEY.format("RSA "), ["private_key"]),
        (KEY.format("OPENSSH "), ["private_key"]),
        ("write to jane.doe+x@mail.company.org.", ["email"]),
        (f"{GITHUB} a@b.co", ["access_token", "email"]),
        ("A file begins with -----BEGIN PRIVATE KEY----- and ends with -----END PRIVATE KEY-----", []),
        ("git clone git@github.com:owner/name.git", []),
        ("name@example.com, x@sub.example.org, me@host.test", []),
        ("logo@2x.png and @decorator and a @ b", []),
        ("hf_short sk-short AKIA123", []),
    ],
)
def test_secrets_are_named_by_kind(text: str, kinds: list[str]) -> None:
    assert secret_kinds(text) == kinds


@pytest.mark.parametrize(
    "pattern", [PRIVATE_KEY, EMAIL, CONTROL, PRIVATE_USE, MOJIBAKE], ids=lambda one: one.pattern[:12]
)
def test_no_pattern_looks_at_a_text_again_and_again(pattern: re.Pattern[str]) -> None:
    """From one place it reads so many characters at most, however long the text: what is read in all grows with the
    text, not with its square. (ACCESS_TOKEN reads on, but from places that a fixed beginning makes few.)
    """
    _, longest = _parser.parse(pattern.pattern, pattern.flags).getwidth()
    assert longest <= 1000


@pytest.mark.parametrize("text", ["a.b-" * 250_000 + "@", "@" + "a." * 500_000, "-----BEGIN " + "A " * 500_000])
def test_long_text_without_secrets_has_none(text: str) -> None:
    """Each is an hour's work for a pattern that is quadratic."""
    assert secret_kinds(text) == damage(text) == []


def test_long_text_of_one_damaged_sign_has_none() -> None:
    assert damage("Ã" * 1_000_000) == []
