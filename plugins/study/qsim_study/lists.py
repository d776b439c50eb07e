"""Lists in the text of an option."""

from __future__ import annotations


def split(text: str) -> list[str]:
    """Split at commas outside of brackets.

    >>> split("abfp(int4, n=64),int8,[gptq, awq]")
    ['abfp(int4, n=64)', 'int8', '[gptq, awq]']
    """
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]
