"""Where text comes from: one file per corpus."""

from heterodox.data.corpus.base import Corpus, Document
from heterodox.data.corpus.file import File
from heterodox.data.corpus.grammar import Grammar
from heterodox.data.corpus.huggingface import HuggingFace
from heterodox.data.corpus.stdlib import Stdlib

__all__ = ["Corpus", "Document", "File", "Grammar", "HuggingFace", "Stdlib"]
