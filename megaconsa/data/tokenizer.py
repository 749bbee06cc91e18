"""The tokenizer: any Hugging Face tokenizer folder, or a sentencepiece BPE that we train.

A trained BPE is written as a Hugging Face folder too.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from megaconsa.data.fingerprint import fingerprint, same_tokenizer
from megaconsa.data.sentencepiece_log import merges_reported
from megaconsa.data.tokenizer_folder import (
    MODEL_INPUTS,
    TOKENIZER_JSON,
    check_vocabulary,
    copy_tokenizer,
    largest_id,
    load_pretrained,
    read_mapping,
)
from megaconsa.errors import InputError
from megaconsa.files import parse_json

if TYPE_CHECKING:
    # Imported late elsewhere, because it takes seconds and most refusals come before.
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
SPACE = "\u2581"
"""The character that sentencepiece writes for a space.

Where a text holds this character itself, it reads back as a space.
"""
SMALLEST_VOCABULARY = 512
"""256 byte pieces, two special tokens, and room for the characters of the text."""
CHUNK = 4000
"""Characters of a training sentence. sentencepiece silently skips sentences above its limit."""
CHECKED_DOCUMENTS = 200
"""Number of documents on which both formats of a trained tokenizer are compared."""


class Tokenizer:
    """Text to ids and back, without special tokens.

    Literal names of special tokens in a text are encoded as plain text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, folder: Path | None = None) -> None:
        """folder: where the tokenizer was loaded from, or None for a new one."""
        self._tokenizer = tokenizer
        self._folder = folder
        self._backend = tokenizer.backend_tokenizer
        # A document that spells "<|endoftext|>" must not end there.
        self._backend.encode_special_tokens = True
        # Documents must be neither cut nor padded.
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocab_size: int = largest_id(tokenizer) + 1
        """One more than the largest id, special tokens included.

        A model needs this many embeddings, even where the ids have holes.
        """
        self.end_of_text: int = tokenizer.eos_token_id
        """Id of the token that follows each document."""

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Reads a tokenizer folder.

        Raises InputError where it is missing, contradictory, or has no end-of-text token.
        """
        if not folder.is_dir():
            raise InputError(
                f"tokenizer {folder}: no such folder, name one that holds tokenizer.json"
            )
        from transformers import PreTrainedTokenizerFast

        tokenizer = load_pretrained(folder)
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise InputError(f"tokenizer {folder}: it has no fast version, add its tokenizer.json")
        if tokenizer.eos_token_id is None:
            raise InputError(
                f"tokenizer {folder}: it has no end-of-text token, "
                "set eos_token in tokenizer_config.json"
            )
        return cls(tokenizer, folder)

    def copy(self, folder: Path) -> None:
        """Creates `folder` from the files that this tokenizer was loaded from.

        `load` reads the copy as the same tokenizer under every release of transformers.
        """
        assert self._folder is not None
        folder.mkdir(parents=True)
        copy_tokenizer(self._folder, folder)
        if not (folder / TOKENIZER_JSON).exists():
            # The tokenizer was converted from an older format.
            # The next release of transformers may convert it differently.
            self._backend.save(str(folder / TOKENIZER_JSON))

    def save(self, folder: Path) -> None:
        """Writes the folder that `load` reads.

        Use it only for tokenizers that we trained. transformers' writer changes other tokenizers.
        """
        self._tokenizer.save_pretrained(str(folder))
        # transformers 5 writes a class name that version 4 does not know. Both know this one.
        file = folder / "tokenizer_config.json"
        config = parse_json(file.read_text())
        if config["tokenizer_class"] == "TokenizersBackend":
            config = {**config, "tokenizer_class": "PreTrainedTokenizerFast"}
            file.write_text(json.dumps(config, indent=2) + "\n")

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text. All cores are used, unless TOKENIZERS_PARALLELISM is false."""
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_with_places(self, text: str) -> tuple[list[int], list[int]]:
        """The ids of a text, and the index of the character at which each begins."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, [begin for begin, _ in encoding.offsets]

    @property
    def unknown_id(self) -> int | None:
        """Id of the token for what the vocabulary cannot write, or None if there is none."""
        unknown: int | None = self._tokenizer.unk_token_id
        # Some folders name the end-of-text token for want of another.
        return None if unknown == self.end_of_text else unknown

    def byte_ids(self) -> list[int]:
        """The ids of tokens that are single bytes of characters that have several bytes."""
        vocabulary = self._tokenizer.get_vocab()
        # A BPE of characters has bytes as a fallback. A BPE of bytes writes each byte as a letter:
        # as chr(byte) where that is visible, and the other 68 as chr(256) and on, of which the
        # first 34 are ASCII.
        names = [f"<0x{byte:02X}>" for byte in range(0x80, 0x100)]
        if names[0] not in vocabulary:
            alphabet = pre_tokenizers.ByteLevel.alphabet()
            names = [letter for letter in alphabet if ord(letter) in range(0x80, 0x100)]
            names += [letter for letter in alphabet if ord(letter) >= 256 + 34]
        return [vocabulary[name] for name in names if name in vocabulary]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, with special tokens spelled out."""
        return str(self._backend.decode([int(i) for i in ids], skip_special_tokens=False))

    @cached_property
    def fingerprint(self) -> str:
        """Changes when a text gets other ids. Compare it with `same_tokenizer`."""
        content = json.loads(self._backend.to_str())
        # The post-processor comes from the file: transformers replaces it when it loads.
        written = content
        if self._folder is not None and (self._folder / TOKENIZER_JSON).is_file():
            written = read_mapping(self._folder / TOKENIZER_JSON)
        return fingerprint(content, written.get("post_processor"))


def load_trained_tokenizer(
    folder: Path, vocab_size: int, trained: str | None
) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a folder as transformers does, for weights that exist.

    vocab_size: of the model.
    trained: fingerprint of the tokenizer that the weights were trained with. None if it is unknown.

    Raises InputError if the tokenizer does not fit the model, or is another one.
    """
    loaded = load_pretrained(folder)
    check_vocabulary(folder, loaded, vocab_size)
    if trained is not None:
        found = Tokenizer.load(folder).fingerprint
        if not same_tokenizer(trained, found):
            raise InputError(
                f"tokenizer={folder} has fingerprint {found}, "
                f"but the weights were trained with {trained}; "
                "give the folder of that one with --tokenizer"
            )
    return loaded


def train_sentencepiece(
    documents: Iterable[str],
    folder: Path,
    vocab_size: int,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Trains a BPE and writes it into `folder` in two formats.

    vocab_size: number of tokens, special tokens and bytes included.
    advance: is called with the number of tokens as they are made, `vocab_size` in all.

    The formats are `sentencepiece.model` and Hugging Face's. Text round-trips exactly, including
    tabs, newlines and runs of spaces. Characters that the vocabulary lacks become bytes. The result
    is a function of the documents and the size alone.

    Raises InputError where the text does not fit the size. Raises RuntimeError where the two
    formats give different ids.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise InputError(
            f"vocabulary {vocab_size} is too small, choose {SMALLEST_VOCABULARY} or more"
        )
    sample: list[str] = []
    model = io.BytesIO()
    made = 0

    def count(merges: int) -> None:
        nonlocal made
        made += merges
        advance(merges)

    try:
        with merges_reported(count):
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_chunks(documents, sample),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                split_digits=True,
                byte_fallback=True,
                character_coverage=0.9999,
                max_sentence_length=4 * CHUNK,  # in bytes, of which a character has up to four
                num_threads=2,
                unk_id=0,
                eos_id=1,
                eos_piece=END_OF_TEXT,
                bos_id=-1,
                pad_id=-1,
                minloglevel=0,  # its progress is in its log
            )
    except RuntimeError as error:
        if KeyboardInterrupt.__name__ in str(error):
            # sentencepiece reports what is raised while it reads the text as an error of its own.
            raise KeyboardInterrupt from error
        reason = str(error).split("] ")[-1].strip()
        raise InputError(
            f"vocabulary {vocab_size} does not fit this text (sentencepiece: {reason}), "
            "choose another size"
        ) from error
    # Bytes, characters and special tokens are no merges.
    advance(vocab_size - made)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sentencepiece.model").write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=_fast_tokenizer(processor),
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_input_names=MODEL_INPUTS,
    )
    Tokenizer(fast).save(folder)
    # Compare what was written, not what is in memory.
    encoded = Tokenizer.load(folder).encode_batch(sample)
    for text, ids in zip(sample, encoded, strict=True):
        if processor.encode(text) != ids:
            raise RuntimeError(
                f"sentencepiece and tokenizer.json in {folder} encode a document differently: "
                f"{text[:80]!r}..."
            )


def _chunks(documents: Iterable[str], sample: list[str]) -> Iterator[str]:
    """The documents in pieces that are short enough for sentencepiece.

    Keeps the first CHECKED_DOCUMENTS documents in `sample`.
    """
    documents = iter(documents)
    for text in islice(documents, CHECKED_DOCUMENTS):
        sample.append(text)
        yield from _cut(text)
    for text in documents:
        yield from _cut(text)


def _cut(text: str) -> Iterator[str]:
    return (text[start : start + CHUNK] for start in range(0, len(text), CHUNK))


def _fast_tokenizer(processor: sentencepiece.SentencePieceProcessor) -> tokenizers.Tokenizer:
    """The same BPE in the tokenizers library. sentencepiece's scores become an order of merges."""
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    normal = []
    for i in range(len(pieces)):
        if not (processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i)):
            normal.append(i)
    # Pieces with larger scores are merged first.
    normal.sort(key=lambda i: (-processor.get_score(i), i))
    merges: list[tuple[str, str]] = []
    for i in normal:
        merges += _merges_into(pieces[i], vocabulary)

    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token=pieces[0], fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    # No piece has a space after another character, so no merge crosses these cuts.
    # They change nothing but the speed.
    words = tokenizers.Regex(f"{SPACE}+[^{SPACE}]*|[^{SPACE}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(words, behavior="isolated")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def _merges_into(piece: str, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """The pairs of pieces that join to `piece`, in the order of their ids."""
    pairs = []
    for cut in range(1, len(piece)):
        left = piece[:cut]
        right = piece[cut:]
        if left in vocabulary and right in vocabulary:
            pairs.append((left, right))
    return sorted(pairs, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
