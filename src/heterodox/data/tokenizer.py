"""The earlier place of `heterodox.data.tokenizers`, kept for parts from outside until version 0.3."""

from heterodox.data.tokenizers import BPE, Byte, Char, Tokenizer, TokenizerFile

__all__ = ["BPE", "Byte", "Char", "Tokenizer", "TokenizerFile"]
