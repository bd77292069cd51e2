"""What a Llama says about texts besides going on with them: labels, rewards, answers, embeddings.

A file has one head (docs/format.md), and each call here asks one kind of it; a call that does not
fit is one LlamaError that names the one that does. generate.Llama is a Heads. Texts given
together are read together, each as if alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Number
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from llama.batch import Batches
from llama.config import Head
from llama.errors import LlamaError
from llama.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llama.facts import Config
    from llama.templates import ChatTemplate

Messages = Sequence[Mapping[str, str]]  # [{"role": "user", "content": "Hi"}, ...]
One = str | Sequence[int] | Messages  # a text, its token ids taken as they are, or a dialog
Many = list[str] | list[list[int]] | list[Messages]

# What a model with each head does, and the call for it.
DOES = {
    Head.LM: ("writes text", "generate() or chat()"),
    Head.NONE: ("gives embeddings", "embed()"),
    Head.SEQUENCE: ("classifies texts", "classify()"),
    Head.ANSWER: ("answers questions about a text", "answer()"),
    Head.TOKEN: ("labels the tokens of a text", "tag()"),
}
REWARDS = "scores texts", "score()"  # a sequence classification model of one label


@dataclass(frozen=True)
class Classification:
    """A text's label. Scores are probabilities: of one label among all (softmax), or for a model of
    several labels at once, or of one, of each by itself (sigmoid); a regression's are its logits.
    """

    label: str  # with the largest score
    score: float
    scores: dict[str, float]  # of every label
    logits: tuple[float, ...]  # by the labels' numbers, as the head gave them


@dataclass(frozen=True)
class Answer:
    """A part of a context: context[start:end]."""

    text: str
    start: int  # in characters
    end: int
    score: float  # 0 to 1: the probabilities of its first and of its last token, multiplied


@dataclass(frozen=True)
class TaggedToken:
    """One token of a text, text[start:end], and its label."""

    token_id: int
    piece: str
    start: int  # in characters; a token that is part of one character has that one
    end: int
    label: str
    score: float  # the label's probability


class Heads:
    """The calls; a Llama has the rest."""

    config: Config
    tokenizer: Tokenizer
    _batches: Batches

    if TYPE_CHECKING:

        @property
        def meta(self) -> dict[str, int | float | str | bytes]: ...
        @property
        def max_seq_len(self) -> int: ...
        @property
        def template(self) -> ChatTemplate: ...

    @property
    def labels(self) -> list[str]:
        """What the head's labels are called, by number; none for a head without labels."""
        if self.config.head not in (Head.SEQUENCE, Head.TOKEN):
            return []
        n = self.config.n_labels
        if "head.labels" not in self.meta:
            return [f"LABEL_{i}" for i in range(n)]
        try:
            labels: Any = json.loads(str(self.meta["head.labels"]))
        except ValueError:
            labels = None
        names = labels if isinstance(labels, list) else []
        if not n == len(names) == len({name for name in names if isinstance(name, str)}):
            raise LlamaError(f"head.labels must be a JSON list of {n} different names")
        return names

    def require(self, head: Head, call: str) -> None:
        """Raises LlamaError unless the model has HEAD, which CALL, as a person wrote it, needs."""
        own = self.config.head
        if own != head:
            reward = own == Head.SEQUENCE and self.config.n_labels == 1
            does, use = REWARDS if reward else DOES[own]
            raise LlamaError(
                f"{call} needs a model that {DOES[head][0]}; this one {does}: use {use}"
            )

    @overload
    def classify(self, text: One) -> Classification: ...
    @overload
    def classify(self, text: Many) -> list[Classification]: ...

    def classify(self, text: Any) -> Any:
        """The label of TEXT: a str, token ids, or a dialog's messages in the model's chat template;
        for a list of these a list. Needs a sequence classification model."""
        self.require(Head.SEQUENCE, "classify()")
        labels = self.labels
        logits, single = self._text_logits(text)
        found = [_classification(labels, row, self.meta.get("head.problem_type")) for row in logits]
        return found[0] if single else found

    @overload
    def score(self, text: One) -> float: ...
    @overload
    def score(self, text: Many) -> list[float]: ...

    def score(self, text: Any) -> Any:
        """The reward of TEXT, a logit of any size; for a list a list. TEXT is as for classify():
        reward models usually read messages that end with the assistant's. Needs a sequence
        classification model of one label."""
        self.require(Head.SEQUENCE, "score()")
        if self.config.n_labels != 1:
            raise LlamaError(
                "score() needs a model of one label, a reward model; this one classifies texts "
                f"by {self.config.n_labels} labels: use classify()"
            )
        logits, single = self._text_logits(text)
        found = [float(row[0]) for row in logits]
        return found[0] if single else found

    def answer(self, question: str, context: str, max_tokens: int = 15) -> Answer:
        """The part of CONTEXT, at most MAX_TOKENS long, that answers QUESTION: of all parts the one
        with the largest score. Needs a question answering model."""
        self.require(Head.ANSWER, "answer()")
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
            raise LlamaError(f"max_tokens must be 1 or more, found {max_tokens!r}")
        a, b = self.tokenizer.encode(question), self.tokenizer.encode(context)
        if not b:
            raise LlamaError("answer() needs a context; this one is empty")
        spans = token_spans(self.tokenizer, context, b)
        ids, first = self._framed("pair", a, b)
        rows = self._rows(self._fitting(ids), range(first, first + len(b)))
        start, end, score = best_span(rows[:, 0], rows[:, 1], max_tokens)
        begin, stop = spans[start][0], spans[end][1]
        text = context[begin:stop]
        begin += len(text) - len(text.lstrip())
        text = text.strip()
        return Answer(text, begin, begin + len(text), score)

    @overload
    def tag(self, text: str) -> list[TaggedToken]: ...
    @overload
    def tag(self, text: list[str]) -> list[list[TaggedToken]]: ...

    def tag(self, text: Any) -> Any:
        """Every token of TEXT with its label; for a list of texts a list of these. Needs a token
        classification model."""
        self.require(Head.TOKEN, "tag()")
        labels = self.labels
        single = isinstance(text, str)
        if not single and not isinstance(text, list):
            raise LlamaError(f"tag() takes a str or a list of str, found {type(text).__name__}")
        inner = [self.tokenizer.encode(each) for each in ([text] if single else text)]
        spans = [token_spans(self.tokenizer, each, ids)
                 for each, ids in zip([text] if single else text, inner, strict=True)]  # fmt: skip
        framed = [self._framed("single", ids) for ids in inner]
        texts = [self._fitting(ids, None if single else n) for n, (ids, _) in enumerate(framed)]
        wanted = [range(first, first + len(ids))
                  for ids, (_, first) in zip(inner, framed, strict=True)]  # fmt: skip
        found: list[list[TaggedToken]] = [[] for _ in texts]
        for n, rows in self._batches.outputs(texts, wanted):
            for row in softmax(rows):
                i, best = len(found[n]), int(row.argmax())
                token = inner[n][i]
                found[n].append(TaggedToken(token, self.tokenizer.piece(token), *spans[n][i],
                                            labels[best], float(row[best])))  # fmt: skip
        return found[0] if single else found

    def embed(
        self, texts: One | Many, pooling: Literal["last", "mean"] = "last", normalize: bool = True
    ) -> NDArray[np.float32]:
        """The hidden states after the last norm, one vector a text: (n, dim), or (dim,) for one
        TEXT that is not in a list; texts as for classify().

        POOLING "last" is the last token's, "mean" the mean of all tokens' that the model reads, the
        begin token too. NORMALIZE: of length 1. For any model: made for one without a head, and a
        language model's will do.
        """
        if pooling not in ("last", "mean"):
            raise LlamaError(f"pooling must be 'last' or 'mean', found {pooling!r}")
        read, single = self._texts(texts)
        wanted = [range(len(ids) - 1 if pooling == "last" else 0, len(ids)) for ids in read]
        out = np.zeros((len(read), self.config.dim))
        for n, rows in self._batches.outputs(read, wanted, hidden=True):
            out[n] += rows.sum(axis=0, dtype=np.float64) / len(wanted[n])
        if normalize:
            lengths = np.linalg.norm(out, axis=1, keepdims=True)
            out /= np.where(lengths > 0, lengths, 1)
        found: NDArray[np.float32] = out.astype(np.float32)
        return found[0] if single else found

    def text_ids(self, text: One) -> list[int]:
        """What classify(), score(), tag() and embed() read for TEXT: a text's ids are those that
        the source's own tokenizer gives it, whole; a dialog's come from the chat template."""
        return self._ids(text, None)

    # --- texts to ids, ids to rows

    def _text_logits(self, given: Any) -> tuple[list[NDArray[np.float32]], bool]:
        """The logits of each text, (n_labels,), at its last token that is no padding; and whether
        one text was given, not a list."""
        texts, single = self._texts(given)
        pad = self.meta.get("head.pad_id")
        ends = [max((i for i, t in enumerate(ids) if t != pad), default=0) for ids in texts]
        found = dict(self._batches.outputs(texts, [range(end, end + 1) for end in ends]))
        return [found[n][0] for n in range(len(texts))], single

    def _rows(self, ids: list[int], wanted: range) -> NDArray[np.float32]:
        return np.concatenate([rows for _, rows in self._batches.outputs([ids], [wanted])])

    def _texts(self, given: Any) -> tuple[list[list[int]], bool]:
        """What was given as lists of token ids, and whether it was one text, not a list of them."""
        self._batches.check_open()
        single = isinstance(given, str) or is_ids(given) or _is_dialog(given)
        if not single and (not isinstance(given, Sequence) or isinstance(given, bytes)):
            raise LlamaError(
                "a text must be a str, a list of token ids, messages or a list of these, found "
                f"{type(given).__name__}"
            )
        texts = [given] if single else given
        return [self._ids(text, None if single else n) for n, text in enumerate(texts)], single

    def _ids(self, text: Any, number: int | None) -> list[int]:
        try:
            if isinstance(text, str):
                ids = self._framed("single", self.tokenizer.encode(text))[0]
            elif _is_dialog(text):
                ids = self.template.encode(text, reply=False)
            elif is_ids(text):
                ids = [self.tokenizer.check(token) for token in text]
            else:
                found = "an empty list" if text == [] else type(text).__name__
                raise LlamaError(f"expected a str, token ids or messages, found {found}")
        except LlamaError as error:
            raise _of_text(number, error) from None
        return self._fitting(ids, number)

    def _fitting(self, ids: list[int], number: int | None = None) -> list[int]:
        """IDS, if they are a text that fits the context."""
        if not 0 < len(ids) <= self.max_seq_len:
            raise _of_text(number, LlamaError(
                f"{len(ids)} tokens, expected 1 to {self.max_seq_len} (the context)"
            ))  # fmt: skip
        return ids

    def _framed(
        self, which: Literal["single", "pair"], a: list[int], b: Sequence[int] = ()
    ) -> tuple[list[int], int]:
        """A, or A and B, with the ids that the source's tokenizer puts around them; and the place
        of A's first token, or of B's where there is one."""
        begin = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        parts: Any = {"single": [*begin, "A"], "pair": [*begin, "A", *begin, "B"]}[which]
        if "tokenizer.frame" in self.meta:
            parts = _frame(self.meta["tokenizer.frame"], which)
        ids: list[int] = []
        first = 0
        for part in parts:
            if isinstance(part, str):
                first = len(ids) if which == "single" or part == "B" else first
                ids += a if part == "A" else b
            else:
                ids.append(self.tokenizer.check(part))
        return ids, first


def is_ids(text: Any) -> bool:
    """Whether TEXT is token ids, at least one, though not each need be one that there is."""
    if isinstance(text, np.ndarray):
        return text.ndim == 1 and text.dtype.kind in "iu"
    return (
        isinstance(text, Sequence) and not isinstance(text, (str, bytes)) and len(text) > 0
        and (isinstance(text[0], Number) or hasattr(text[0], "__index__"))
        and not isinstance(text[0], np.ndarray)
    )  # fmt: skip


def _is_dialog(text: Any) -> bool:
    return isinstance(text, Sequence) and len(text) > 0 and isinstance(text[0], Mapping)


def _of_text(number: int | None, error: LlamaError) -> LlamaError:
    return error if number is None else LlamaError(f"text {number}: {error}")


def _frame(text: Any, which: str) -> list[int | str]:
    """The meta entry tokenizer.frame's list for a text or a pair."""
    texts = ["A"] if which == "single" else ["A", "B"]
    try:
        parts = list(json.loads(str(text))[which])
    except (ValueError, KeyError, TypeError):
        parts = []
    if sorted(str(part) for part in parts if type(part) is not int) != texts:
        raise LlamaError(
            'tokenizer.frame must be JSON, {"single": [1, "A"], "pair": [1, "A", 1, "B"]}'
        )
    return parts


def token_spans(tokenizer: Tokenizer, text: str, ids: Sequence[int]) -> list[tuple[int, int]]:
    """The characters [start, end) of TEXT of each of IDS, its tokens: all that a byte of the token
    belongs to. LlamaError for a tokenizer that does not keep the text as it is."""
    data = text.encode()
    pieces = [tokenizer.token_bytes(token) for token in ids]
    said = b"".join(pieces)
    added = len(said) - len(data)  # the space that some put before the first word
    if said != b" " * added + data:
        raise LlamaError("this model's tokenizer rewrites the text: its tokens have no place in it")
    of_byte = [i for i, char in enumerate(text) for _ in char.encode()] + [len(text)]
    spans: list[tuple[int, int]] = []
    at = -added
    for piece in pieces:
        first, at = max(at, 0), at + len(piece)
        spans.append((of_byte[first], of_byte[at - 1] + 1 if at > first else of_byte[first]))
    return spans


def best_span(
    starts: NDArray[np.float32], ends: NDArray[np.float32], longest: int
) -> tuple[int, int, float]:
    """The first and last place, at most LONGEST apart counting both, whose probabilities as start
    and end, (n) logits each, multiply to the most; and that product. The first of equals."""
    p, q = softmax(starts), softmax(ends)
    best = (0, 0, -1.0)
    for apart in range(min(longest, len(p))):
        scores = p[: len(p) - apart] * q[apart:]
        at = int(scores.argmax())
        if scores[at] > best[2]:
            best = (at, at + apart, float(scores[at]))
    return best


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Over the last axis, in float64."""
    x = logits.astype(np.float64)
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    shares: NDArray[np.float64] = x / x.sum(axis=-1, keepdims=True)
    return shares


def _classification(labels: list[str], row: NDArray[np.float32], problem: Any) -> Classification:
    """Which scores a problem has is as transformers' TextClassificationPipeline has it."""
    x = row.astype(np.float64)
    if problem == "regression":
        scores = x
    elif problem == "multi_label_classification" or len(labels) == 1:
        scores = np.exp(-np.logaddexp(0, -x))  # 1 / (1 + exp(-x)), whatever x
    else:
        scores = softmax(row)
    best = int(scores.argmax())
    by_label = dict(zip(labels, map(float, scores), strict=True))
    return Classification(labels[best], float(scores[best]), by_label, tuple(map(float, row)))
