"""How text becomes ids: one file per tokenizer."""

from heterodox.data.tokenizer.base import Tokenizer
from heterodox.data.tokenizer.bpe import BPE
from heterodox.data.tokenizer.byte import Byte
from heterodox.data.tokenizer.char import Char
from heterodox.data.tokenizer.file import TokenizerFile, load_tokenizer, parse

__all__ = ["BPE", "Byte", "Char", "Tokenizer", "TokenizerFile", "load_tokenizer", "parse"]
