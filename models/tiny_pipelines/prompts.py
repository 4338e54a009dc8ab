"""Texts that the tiny tokenizers know word for word."""

NUMERALS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = tuple(f"a handwritten {numeral}" for numeral in NUMERALS)
PROMPTS = (*CAPTIONS, "Generate an image.", "Edit this image.")
