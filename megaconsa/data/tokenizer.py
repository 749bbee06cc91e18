"""The tokenizer: any Hugging Face tokenizer folder, or a sentencepiece BPE of one's own that is one too."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megaconsa.data.fingerprint import fingerprint
from megaconsa.data.tokenizer_folder import (
    TOKENIZER_JSON,
    copy_tokenizer,
    largest_id,
    load_pretrained,
    read_mapping,
)
from megaconsa.errors import InputError
from megaconsa.files import parse_json

END_OF_TEXT = "<|endoftext|>"
SPACE = "\u2581"
"""What sentencepiece writes for a space. A text that holds this character itself reads back with a space in its place."""
SMALLEST_VOCABULARY = 512
"""256 byte pieces, two special tokens, and room for the characters of the text."""
CHUNK = 4000
"""Characters of a training sentence: sentencepiece skips, silently, what is longer than its limit."""
CHECKED_DOCUMENTS = 200


class Tokenizer:
    """Text to ids and back, without special tokens. Literal names of special tokens in a text are encoded as plain text."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, folder: Path | None = None) -> None:
        """folder: where it was loaded from; None for one that was just made."""
        self._tokenizer = tokenizer
        self._folder = folder
        self._backend = tokenizer.backend_tokenizer
        # A document that spells "<|endoftext|>" must not end there; and nothing may cut or pad documents.
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocab_size: int = largest_id(tokenizer) + 1
        """One more than the largest id, special tokens included: what a model needs, also where ids
        have holes.
        """
        self.end_of_text: int = tokenizer.eos_token_id
        """Id of the token that follows each document."""

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Reads a tokenizer folder.

        InputError where it is missing, contradictory, or has no end-of-text token.
        """
        if not folder.is_dir():
            raise InputError(
                f"tokenizer {folder}: no such folder, name one that holds tokenizer.json"
            )
        tokenizer = load_pretrained(folder)
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise InputError(f"tokenizer {folder}: it has no fast version, add its tokenizer.json")
        if tokenizer.eos_token_id is None:
            raise InputError(
                f"tokenizer {folder}: it has no end-of-text token, set eos_token in tokenizer_config.json"
            )
        return cls(tokenizer, folder)

    def copy(self, folder: Path) -> None:
        """Makes `folder`, which `load` reads as this tokenizer under every release, of the files it
        was loaded from.
        """
        assert self._folder is not None
        folder.mkdir(parents=True)
        copy_tokenizer(self._folder, folder)
        if not (folder / TOKENIZER_JSON).exists():
            # Converted from an older format, which the next release may do otherwise.
            self._backend.save(str(folder / TOKENIZER_JSON))

    def save(self, folder: Path) -> None:
        """Writes the folder that `load` reads; for a tokenizer of our own, as transformers' writer
        bends those of others.
        """
        self._tokenizer.save_pretrained(str(folder))
        # transformers 5 notes a class that 4 does not know; both know this one.
        file = folder / "tokenizer_config.json"
        config = parse_json(file.read_text())
        if config["tokenizer_class"] == "TokenizersBackend":
            file.write_text(
                json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2)
                + "\n"
            )

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, on all cores."""
        return [
            encoding.ids
            for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, special tokens spelled out."""
        return str(self._backend.decode([int(i) for i in ids], skip_special_tokens=False))

    @property
    def fingerprint(self) -> str:
        """Changes when a text gets other ids; compare with `same_tokenizer`."""
        content = json.loads(self._backend.to_str())
        written = content
        if self._folder is not None and (self._folder / TOKENIZER_JSON).is_file():
            written = read_mapping(self._folder / TOKENIZER_JSON)
        return fingerprint(content, written.get("post_processor"))


def train_sentencepiece(documents: Iterable[str], folder: Path, vocab_size: int) -> None:
    """Trains a BPE and writes `sentencepiece.model` and the same tokenizer in Hugging Face's format into `folder`.

    Text round-trips exactly, tabs, newlines and runs of spaces included; characters that the vocabulary lacks become bytes.
    The result is a function of the documents and the size alone. InputError where the text does not fit the size;
    RuntimeError where the two formats give different ids.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise InputError(
            f"vocabulary {vocab_size} is too small, choose {SMALLEST_VOCABULARY} or more"
        )
    sample: list[str] = []
    model = io.BytesIO()
    try:
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
            max_sentence_length=4 * CHUNK,  # bytes
            num_threads=2,
            unk_id=0,
            eos_id=1,
            eos_piece=END_OF_TEXT,
            bos_id=-1,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).split("] ")[-1].strip()
        raise InputError(
            f"vocabulary {vocab_size} does not fit this text (sentencepiece: {reason}), choose another size"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sentencepiece.model").write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    fast = PreTrainedTokenizerFast(
        tokenizer_object=_fast_tokenizer(processor),
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
    Tokenizer(fast).save(folder)
    for text, ids in zip(sample, Tokenizer.load(folder).encode_batch(sample), strict=True):
        if processor.encode(text) != ids:
            raise RuntimeError(
                f"sentencepiece and tokenizer.json in {folder} encode a document differently: {text[:80]!r}..."
            )


def _chunks(documents: Iterable[str], sample: list[str]) -> Iterator[str]:
    """The documents in pieces short enough for sentencepiece; keeps the first ones in `sample`."""
    documents = iter(documents)
    for text in islice(documents, CHECKED_DOCUMENTS):
        sample.append(text)
        yield from _cut(text)
    for text in documents:
        yield from _cut(text)


def _cut(text: str) -> Iterator[str]:
    return (text[start : start + CHUNK] for start in range(0, len(text), CHUNK))


def _fast_tokenizer(processor: sentencepiece.SentencePieceProcessor) -> tokenizers.Tokenizer:
    """The same BPE in the tokenizers library: sentencepiece's scores become an order of merges."""
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    normal = [
        i
        for i in range(len(pieces))
        if not (processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i))
    ]
    merges: list[tuple[str, str]] = []
    for i in sorted(normal, key=lambda i: (-processor.get_score(i), i)):
        halves = [(pieces[i][:cut], pieces[i][cut:]) for cut in range(1, len(pieces[i]))]
        known = [
            (left, right) for left, right in halves if left in vocabulary and right in vocabulary
        ]
        merges += sorted(known, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))

    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token=pieces[0], fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    # No piece has a space after another character, so no merge crosses these cuts: they change nothing but the speed.
    words = tokenizers.Regex(f"{SPACE}+[^{SPACE}]*|[^{SPACE}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(words, behavior="isolated")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer
