"""The corpora and tokenizers that a recipe can choose from."""

from heterodox.core.slot import Slot
from heterodox.data.corpus import Corpus, File, Grammar, HuggingFace, Stdlib
from heterodox.data.tokenizer import BPE, Byte, Char, TokenizerFile

CORPORA = Slot("corpus", Corpus, (Stdlib, File, HuggingFace, Grammar))
TOKENIZERS = Slot("tokenizer", object, (Byte, Char, BPE, TokenizerFile))

CorpusConfig = CORPORA.section()
TokenizerConfig = TOKENIZERS.section()
