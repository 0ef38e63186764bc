"""The corpora and tokenizers that a recipe can choose from."""

from heterodox.core.slot import Slot
from heterodox.data.corpora import Corpus, File, Stdlib
from heterodox.data.grammar import Grammar
from heterodox.data.huggingface import HuggingFace
from heterodox.data.tokenizers import BPE, Byte, Char, TokenizerFile

CORPORA = Slot("corpus", Corpus, (Stdlib, File, HuggingFace, Grammar))
TOKENIZERS = Slot("tokenizer", object, (Byte, Char, BPE, TokenizerFile))

CorpusConfig = CORPORA.section()
TokenizerConfig = TOKENIZERS.section()
