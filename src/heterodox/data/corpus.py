"""The earlier place of `heterodox.data.corpora`, kept for parts from outside until version 0.3."""

from heterodox.data.corpora import Corpus, Document, File, Stdlib

__all__ = ["Corpus", "Document", "File", "Stdlib"]
