"""Colours of the pages and of their figures, in a light and a dark version: the one place that names them."""

from __future__ import annotations

from collections.abc import Sequence

# token: (light, dark). Every light value is unique, because figures are drawn in it and then refer to the token.
# Arms have Okabe and Ito's hues, which stay apart without full colour vision, at a lightness that fits each paper.
TOKENS = {
    "paper": ("#fdfdfc", "#16151a"),
    "card": ("#ffffff", "#1e1d24"),
    "tint": ("#f4f3f0", "#282730"),
    "line": ("#dedcd6", "#3a3842"),
    "ink": ("#1d1b20", "#eceaf0"),
    "soft": ("#5f5b66", "#aca8b6"),
    "accent": ("#6b2f8f", "#d0a2ee"),
    "good": ("#00664b", "#5ed3ab"),
    "bad": ("#a33300", "#ff9b6e"),
    "mark": ("#efe2f6", "#48305a"),
    "arm-teacher": ("#b07a00", "#e6b64c"),
    "arm-base": ("#7b7782", "#9b97a5"),
    "arm-sft": ("#0a6aa8", "#5db4ea"),
    "arm-lavender": ("#8a3fb0", "#c78ee8"),
    "arm-shuffled": ("#c9540a", "#f0934e"),
    "arm-centre": ("#857100", "#dcc84a"),
    "arm-oracle": ("#0b7d5e", "#48c9a2"),
    "arm-a": ("#a3195b", "#f58abb"),
    "arm-b": ("#3b5b00", "#a6d854"),
    "arm-c": ("#5b3b00", "#d9a066"),
    "arm-d": ("#00566b", "#6ccbe0"),
}
SPARE = ("arm-a", "arm-b", "arm-c", "arm-d")


def token(arm: str, arms: Sequence[str]) -> str:
    """The token of an arm's colour; arms without a colour of their own take the spare ones in order."""
    if f"arm-{arm}" in TOKENS and f"arm-{arm}" not in SPARE:
        return f"arm-{arm}"
    own = [name for name in arms if f"arm-{name}" not in TOKENS or f"arm-{name}" in SPARE]
    return SPARE[own.index(arm) % len(SPARE)] if arm in own else "soft"


def css() -> str:
    """The tokens as CSS variables that follow the reader's colour scheme."""
    light, dark = (";".join(f"--{name}:{pair[i]}" for name, pair in TOKENS.items()) for i in (0, 1))
    return (
        f":root{{color-scheme:light;{light}}}\n"
        f"@media (prefers-color-scheme:dark){{:root{{color-scheme:dark;{dark}}}}}\n"
    )


def themed(svg: str) -> str:
    """A figure drawn in the light colours, referring to the tokens instead."""
    for name, (light, _) in TOKENS.items():
        svg = svg.replace(light, f"var(--{name})")
    return svg
