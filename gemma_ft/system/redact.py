"""What a secret, a person's address or a path of this machine looks like in text: the one home of these patterns."""

import re

ACCESS_TOKEN = re.compile(
    r"\b(?:(?:hf_|gh[pousr]_)[A-Za-z0-9]{20,}|(?:sk-|github_pat_|glpat-|wandb_)[A-Za-z0-9_-]{20,}"
    r"|(?:AKIA|ASIA)[0-9A-Z]{16})\b"
)
# What is struck out of a text that others will read: there a short one, or a name that only looks so, costs nothing.
PERHAPS_A_TOKEN = re.compile(
    r"\b(?:hf_|gh[a-z]_|sk-|github_pat_|glpat-|wandb_)[A-Za-z0-9_-]{12,}|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"
)
CREDENTIALS = re.compile(r"(?<=://)[^\s/@]+@")
# From the root, from home, from above, or from a drive; not the slashes inside an address or a relative path.
LOCAL_PATH = re.compile(r"(?:\bfile://|(?<![\w:/.~])(?:~|\.\.|[A-Za-z]:)?)[/\\][^\s;,'\"]+")
# From such a beginning to the last separator: where one path with spaces ends, and another begins, cannot be told.
LOCAL_FOLDERS = re.compile(r"(?:\bfile://|(?<![\w:/.~])(?:~[\w.-]*|\.\.|[A-Za-z]:)?)[/\\](?:.*[/\\])?", re.DOTALL)
# The header alone stands in many a manual: what follows it must be as long as a key.
PRIVATE_KEY = re.compile(r"-----BEGIN (?:[A-Z0-9]{1,16} ){0,3}PRIVATE KEY(?: BLOCK)?-----[^-]{64}")
EMAIL = re.compile(r"(?<![\w.%+-])([\w.%+-]{1,64})@((?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24})\b")
NO_PERSON = ("git",)  # git@github.com:owner/name is a place
# RFC 2606 keeps these for examples; the last are names of pictures, as logo@2x.png.
NO_MAIL = re.compile(r"(?:^|\.)(?:example(?:\.(?:com|net|org))?|test|invalid|localhost|png|jpe?g|gif|svg|webp)$", re.I)


def secret_kinds(text: str) -> list[str]:
    """The kinds of secrets that a text seems to hold: "access_token", "private_key", "email"; never the text itself."""
    kinds = []
    if ACCESS_TOKEN.search(text):
        kinds.append("access_token")
    if "PRIVATE KEY" in text and PRIVATE_KEY.search(text):
        kinds.append("private_key")
    if "@" in text and any(
        name not in NO_PERSON and not NO_MAIL.search(domain) for name, domain in EMAIL.findall(text)
    ):
        kinds.append("email")
    return kinds
