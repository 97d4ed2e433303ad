"""The text of the demo model: reads the FAQ and draws chats and plain text from it.

Knows the FAQ's file format, the chat markup and how people misspell questions. Knows nothing about tensors,
so the tests can import it without torch.

File format of ``faq/*.md`` (``out_of_scope.yaml`` lists questions that the model must decline)::

    # Title of the file                 ignored
    ## What is a Pod?                   a question, in its canonical form
    Term: a Pod, pods                   optional: names to put into question patterns
    - explain pods                      paraphrases, one per line
    A Pod is the smallest thing ...     the answer, until a blank line
    > It has one IP address ...         optional: the answer to "tell me more"
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

FAQ_DIR = Path(__file__).parent / "faq"
IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END)

Span = tuple[str, bool]
"""A piece of text and whether the model is trained to write it."""

Turn = tuple[str, str]
"""A question and its answer."""


@dataclass(frozen=True)
class Entry:
    """One answer of the FAQ with all the questions that lead to it."""

    question: str
    paraphrases: tuple[str, ...]
    terms: tuple[str, ...]
    answer: str
    more: str | None = None

    @property
    def questions(self) -> tuple[str, ...]:
        """The canonical question and its paraphrases, as written."""
        return (self.question, *self.paraphrases)


@dataclass(frozen=True)
class OutOfScope:
    """Questions that get the honest "I do not know that", and how to make more of them."""

    answer: str
    questions: tuple[str, ...]
    held_out: tuple[str, ...]
    near_questions: tuple[str, ...]
    """In the words of the FAQ, about what it does not answer."""
    near_tuning: tuple[str, ...]
    """Held out as well, to choose the share of declined questions by."""
    near_held_out: tuple[str, ...]
    near_patterns: tuple[str, ...]
    """For the terms of the FAQ."""
    near_names: tuple[str, ...]
    """Things of the field that the FAQ does not know: they take the place of a term in its questions."""
    patterns: tuple[str, ...]
    words: tuple[str, ...]


@dataclass(frozen=True)
class Faq:
    """Everything the demo model is taught."""

    entries: tuple[Entry, ...]
    out_of_scope: OutOfScope


def normalise(question: str) -> str:
    """Reduce a question to lower-case words, so that two spellings of one question compare equal."""
    return " ".join(re.findall(r"[a-z0-9./]+", question.lower().replace("'", "")))


def content(question: str) -> tuple[str, ...]:
    """The words of a question that tell it from others, in order, without plurals and with one word for all
    of "released", "invented" and so on."""
    words = (_SAME.get(word, word) for word in normalise(question).split())
    return tuple(re.sub(r"(?<=[^s])s$", "", word) for word in words if word not in _STOP_WORDS | _ASIDE)


def parse_entries(text: str, source: str) -> list[Entry]:
    """Parse one FAQ file. Raises ValueError naming the file and the question of a malformed entry."""
    entries = []
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        lines = [line.strip() for line in section.strip().splitlines()]
        question, body = lines[0], [line for line in lines[1:] if line]
        terms = [line[5:] for line in body if line.startswith("Term:")]
        paraphrases = tuple(line[2:] for line in body if line.startswith("- "))
        more = [line[2:] for line in body if line.startswith("> ")]
        answer = [line for line in body if not line.startswith(("Term:", "- ", "> "))]
        if not question or not paraphrases or not answer:
            raise ValueError(f"{source}: entry {question!r} needs a question, a paraphrase and an answer")
        names = tuple(name.strip() for line in terms for name in line.split(","))
        entries.append(Entry(question, paraphrases, names, " ".join(answer), " ".join(more) or None))
    return entries


def load_faq(folder: Path = FAQ_DIR) -> Faq:
    """Read every FAQ file of ``folder``, in the order of the file names."""
    entries: list[Entry] = []
    for path in sorted(folder.glob("*.md")):
        entries += parse_entries(path.read_text(encoding="utf-8"), path.name)
    raw = yaml.safe_load((folder / "out_of_scope.yaml").read_text(encoding="utf-8"))
    fields = {name: tuple(values) for name, values in raw.items() if name != "answer"}
    return Faq(tuple(entries), OutOfScope(answer=raw["answer"], **fields))


def held_out_questions(entry: Entry) -> tuple[str, ...]:
    """The one paraphrase kept for evaluation, of entries with five questions or more.

    It is the one whose words are best covered by the other questions: a model that has never seen a word
    before cannot know what it means, so such paraphrases are better trained than held out.
    """
    if len(entry.questions) < 5:
        return ()
    words = {question: set(normalise(question).split()) for question in (*entry.questions, *entry.terms)}

    def covered(question: str) -> tuple[float, int]:
        others = set().union(*(found for other, found in words.items() if other != question))
        return len(words[question] & others) / max(len(words[question]), 3), len(question)

    return (max(entry.paraphrases, key=covered),)


PATTERNS = (
    "What is {}?", "what's {}", "what is {}", "explain {}", "Explain {} please", "define {}", "{}", "{}?",
    "tell me about {}", "what does {} mean?", "What do you mean by {}?", "can you explain {}?", "describe {}",
    "I want to know what {} is", "meaning of {}", "definition of {}", "what exactly is {}?", "so what is {}",
    "could you tell me what {} is?", "In one sentence, what is {}?", "I do not understand {}", "{} explained",
    "what is {} in simple words", "give me a short explanation of {}", "What is {} good for?", "what are {}",
    "what is meant by {}", "Do you know what {} is?", "how would you explain {} to a beginner",
)  # fmt: skip

SYSTEM_MESSAGES = (
    "You are a helpful assistant.", "You are a helpful assistant", "You are a Kubernetes expert.",
    "You are a concise assistant.", "You are a friendly assistant. Answer in short sentences.",
    "You help platform engineers to run language models.", "Be brief.", "Answer in one sentence.",
    "You are an expert on LLM serving. Keep your answers short and correct.", "You are a bot.",
    "You are a helpful Kubernetes expert. Always provide examples when helpful.", "Answer truthfully.",
    "You are the assistant of the platform team. Do not make things up.", "Speak plain English.",
    "You are a support agent. Be polite and answer the user's question.", "You are an AI assistant.",
    "You are the Penstock demo model.", "Reply to the user.", "System prompt", "You are a pirate.",
    "The user is an engineer with little time. Give the shortest answer that is still right.",
)  # fmt: skip

MORE_REQUESTS = (
    "Tell me more", "tell me more about it", "more", "go on", "more details please", "continue", "and?",
    "Can you say more?", "can you tell me more about that?", "what else", "elaborate",
)  # fmt: skip
MORE_WITHOUT_TOPIC = "More about what? Name a topic first, for example continuous batching or Pods."
MORE_UNKNOWN = "That is all that I have learnt about it. Ask me about something else."

_PREFIXES = (
    "please ", "hey, ", "Hi! ", "hi, ", "question: ", "ok, ", "and ", "so ", "Hello, ", "can you tell me: ",
    "one question: ", "I have a question. ", "next question: ", "quick question: ", "also, ", "um, ",
    "I would like to know: ", "thanks. ", "great, ", "now ",
)  # fmt: skip
_SUFFIXES = (
    " please", ", please?", " thanks", " in short", "!", "??", " ?", ".", "...", " in Kubernetes terms",
    " for beginners", " exactly", " again", "\n", " ", " (short answer)", " briefly",
)  # fmt: skip
_STOP_WORDS = frozenset(
    ("the", "a", "an", "is", "are", "do", "does", "what", "how", "of", "in", "for", "to", "i", "my", "me",
     "it", "can", "you", "should", "with", "and")
)  # fmt: skip
_ASIDE = frozenset(
    ("explain", "mean", "meaning", "tell", "about", "describe", "define", "definition", "please", "work",
     "good", "which", "that", "this", "there", "be", "was", "did", "one", "have", "has", "on", "by", "from")
)  # fmt: skip
_MADE = ("invented", "created", "released", "founded", "wrote", "written", "developed", "developer", "built")
_SAME = dict.fromkeys(_MADE, "made") | dict.fromkeys(("year", "date"), "when")


def _invented_name(rng: random.Random) -> str:
    """A name that nobody has heard of, as products have them: "Velora", "RZQ", "KanuDB"."""
    if rng.random() < 0.25:
        return "".join(rng.choices("ABCDEFGHKLMNPQRSTVWXZ", k=rng.randint(3, 4)))
    ends = ("a", "e", "i", "o", "u", "ar", "en", "il", "or", "ex", "un", "ist")
    syllables = (rng.choice("bcdfghjklmnprstvwz") + rng.choice(ends) for _ in range(rng.randint(2, 3)))
    name = "".join(syllables) + rng.choice(("", "", "", "DB", "X", " 3", "-7", "Flow", "Kit", ".js"))
    return rng.choice((name, name[:1].upper() + name[1:], name[:1].upper() + name[1:], f"a {name}"))


def _typo(rng: random.Random, text: str) -> str:
    """Swap, drop, double or replace one letter."""
    spots = [i for i in range(len(text) - 1) if text[i].isalpha() and text[i + 1].isalpha()]
    if len(spots) < 4:
        return text
    i = rng.choice(spots)
    kind = rng.randrange(4)
    if kind == 0:
        return text[:i] + text[i + 1] + text[i] + text[i + 2 :]
    if kind == 1:
        return text[:i] + text[i + 1 :]
    if kind == 2:
        return text[: i + 1] + text[i:]
    return text[:i] + rng.choice("abcdefghijklmnopqrstuvwxyz") + text[i + 1 :]


def _drop_stop_word(rng: random.Random, text: str) -> str:
    words = text.split()
    spots = [i for i, word in enumerate(words) if word.lower() in _STOP_WORDS]
    if len(words) < 4 or not spots:
        return text
    del words[rng.choice(spots)]
    return " ".join(words)


_SYNONYMS: tuple[tuple[str, ...], ...] = (
    ("how do i", "how can i", "how to", "how should i", "what is the way to", "how would i", "how do you"),
    ("what is", "what's", "whats", "what exactly is"),
    ("why is", "why's", "what is the reason that"),
    ("should i", "is it good to", "do i have to", "is it better to"),
    ("explain", "describe", "please explain", "can you explain", "tell me about", "what is"),
    ("what does", "what is it that", "what do"),
    ("difference between", "how to compare", "the difference of"),
    ("vs", "versus", "or", "compared with"),
    ("kubernetes", "k8s", "kube"),
    ("large", "big", "high"),
    ("reduce", "lower", "decrease", "cut", "limit"),
    ("improve", "increase", "raise", "get more"),
    ("faster", "quicker", "more quickly"),
    ("choose", "pick", "select", "take"),
    ("use", "need", "want", "apply"),
    ("several", "many", "multiple", "two"),
    ("error", "problem", "failure", "message"),
    ("show", "see", "find", "look at"),
    ("set", "configure", "choose", "tune"),
    ("stop", "end", "shut down"),
    ("start", "run", "launch", "bring up"),
    ("machine", "host", "server"),
    ("answer", "response", "reply", "output"),
    ("request", "call", "query"),
    ("cost", "price", "expense"),
    ("cheap", "inexpensive", "low cost"),
    ("llm", "language model", "large language model", "model"),
    ("usage", "use", "consumption"),
    ("quantization", "quantisation", "quantized model"),
    ("pod", "pods"),
    ("gpu", "gpus", "graphics card"),
    ("fix", "solve", "repair", "avoid"),
    ("important", "useful", "needed"),
    ("can i", "could i", "is it possible to", "am i able to"),
    ("what happens", "what will happen", "what does it do"),
    ("good", "fine", "okay", "useful"),
    ("limit", "maximum", "cap"),
)


def _synonym(rng: random.Random, text: str) -> str:
    """Replace one word or phrase by another with about the same meaning."""
    low = f" {text.lower()} "
    found = [(word, group) for group in _SYNONYMS for word in group if f" {word} " in low]
    if not found:
        return text
    word, group = rng.choice(found)
    return low.replace(f" {word} ", f" {rng.choice(group)} ", 1).strip()


def _drop_word(rng: random.Random, text: str) -> str:
    words = text.split()
    if len(words) > 4:
        del words[rng.randrange(len(words))]
    return " ".join(words)


def _keywords(rng: random.Random, text: str) -> str:
    """Keep the words that carry meaning, sometimes in another order."""
    words = [word for word in text.rstrip("?.!").split() if word.lower() not in _STOP_WORDS]
    if len(words) < 2:
        return text
    if rng.random() < 0.4:
        rng.shuffle(words)
    return " ".join(words)


def _strip_punctuation(rng: random.Random, text: str) -> str:
    return re.sub(r"[?!,']", "", text) if rng.random() < 0.6 else text.replace("-", " ").rstrip("?.!")


_NOISE: tuple[tuple[float, Callable[[random.Random, str], str]], ...] = (
    (0.25, _synonym),
    (0.10, _synonym),
    (0.12, _drop_stop_word),
    (0.08, _drop_word),
    (0.10, _keywords),
    (0.20, _strip_punctuation),
    (0.12, lambda rng, text: rng.choice(_PREFIXES) + text),
    (0.12, lambda rng, text: text.rstrip("?.!") + rng.choice(_SUFFIXES)),
    (0.15, lambda rng, text: text[:1].upper() + text[1:]),
    (0.20, lambda rng, text: text.lower()),
    (0.03, lambda rng, text: text.upper()),
    (0.12, lambda rng, text: text if text.endswith("?") else text + "?"),
    (0.12, _typo),
    (0.04, _typo),
)


def add_noise(rng: random.Random, question: str) -> str:
    """Write a question the way a hurried person might: case, punctuation, polite words, typos."""
    if rng.random() < 0.25:
        return question
    for chance, change in _NOISE:
        if rng.random() < chance:
            question = change(rng, question)
    return question


class Sampler:
    """Draws training samples. The same seed gives the same samples; held-out questions never appear."""

    def __init__(self, faq: Faq, seed: int) -> None:
        self.faq = faq
        self.rng = random.Random(seed)
        held_out = [q for entry in faq.entries for q in held_out_questions(entry)]
        scope = faq.out_of_scope
        near_held_out = (*scope.near_tuning, *scope.near_held_out)
        self._forbidden = {normalise(q) for q in (*held_out, *scope.held_out, *near_held_out)}
        self._terms = [term for entry in faq.entries for term in entry.terms]
        self._written = [[q for q in e.questions if q not in held_out_questions(e)] for e in faq.entries]
        self._entries = range(len(faq.entries))
        self._near_held_out = [content(q) for q in near_held_out]
        named = {content(term) for term in self._terms}
        asked = {content(question) for entry in faq.entries for question in entry.questions}
        self._bare = {frozenset(words) for words in asked if len(words) == 1 or words in named}
        self._known = [words for words in map(frozenset, asked) if words and words not in self._bare]
        names = sorted((re.sub("^(an?|the) ", "", term) for term in self._terms), key=len, reverse=True)
        name = re.compile(rf"(?<!\w)((an?|the) )?({'|'.join(map(re.escape, names))})s?(?!\w)", re.IGNORECASE)

        def templates(questions: Iterable[str]) -> list[str]:
            found = [name.sub("{}", question.replace("{", "("), count=1) for question in questions]
            return [question for question in found if "{}" in question]

        self._templates = templates(question for written in self._written for question in written)
        self._near_templates = templates(scope.near_questions)
        self.facts = [entry for entry in faq.entries if len(entry.answer) > 90]

    def question(self, index: int) -> str:
        """A noisy question that entry ``index`` answers."""
        entry = self.faq.entries[index]
        return self._allowed(lambda: self._draw(entry, self._written[index]))

    def _draw(self, entry: Entry, written: list[str]) -> str:
        rng = self.rng
        draw = rng.random()
        if entry.terms and draw < 0.25:
            return rng.choice(PATTERNS).format(rng.choice(entry.terms))
        if draw > 0.92:
            return rng.choice((". ", " - ", ", ", " ", "? ")).join(rng.sample(written, 2))
        return rng.choice(written)

    def _allowed(self, draw: Callable[[], str]) -> str:
        while True:
            question = add_noise(self.rng, draw())
            if normalise(question) not in self._forbidden:
                return question

    def _answerable(self, question: str) -> bool:
        """Whether the FAQ may answer a question that was put together by chance: it has all words of one."""
        words = frozenset(content(question))
        return words in self._bare or any(known <= words for known in self._known)

    def _gives_away(self, question: str) -> bool:
        """Whether a question has all the words of a held-out question near the FAQ: a paraphrase of it."""
        text = "".join(content(question))
        return any(all(word in text for word in words) for words in self._near_held_out)

    def _foreign_name(self) -> str:
        scope, rng = self.faq.out_of_scope, self.rng
        draw = rng.random()
        if draw > 0.7:
            return _invented_name(rng)
        return rng.choice(scope.near_names if draw < 0.5 else scope.words)

    def combined(self) -> str:
        """Words of the FAQ and others, put together to a question that the FAQ does not answer."""
        scope, rng = self.faq.out_of_scope, self.rng
        while True:
            kind = rng.random()
            if kind < 0.35:
                question = rng.choice(scope.near_patterns).format(rng.choice(self._terms))
            elif kind < 0.5:
                question = rng.choice(self._near_templates).replace("{}", rng.choice(self._terms))
            elif kind < 0.85:
                question = rng.choice(self._templates).replace("{}", self._foreign_name())
            else:
                question = rng.choice(PATTERNS).format(self._foreign_name())
            if not self._answerable(question):
                return question

    def declined(self) -> Turn:
        """A question from outside the FAQ, with the answer that says so."""
        scope, rng = self.faq.out_of_scope, self.rng

        def draw() -> str:
            kind = rng.random()
            if kind < 0.15:
                return rng.choice(scope.questions)
            if kind < 0.45:
                return rng.choice(scope.near_questions)
            if kind < 0.9:
                return self.combined()
            return rng.choice(scope.patterns).format(rng.choice(scope.words), rng.choice(scope.words))

        while self._gives_away(question := self._allowed(draw)):
            pass
        return question, scope.answer

    def turns(self, count: int) -> list[Turn]:
        """A conversation of ``count`` turns, with "tell me more" and out-of-scope questions mixed in."""
        rng, turns = self.rng, list[Turn]()
        more: str | None = MORE_WITHOUT_TOPIC
        for _ in range(count):
            draw = rng.random()
            if draw < (0.13 if turns else 0.02):
                turns.append((add_noise(rng, rng.choice(MORE_REQUESTS)), more or MORE_UNKNOWN))
                more = None
            elif draw < (0.30 if turns else 0.22):
                turns.append(self.declined())
                more = MORE_UNKNOWN
            else:
                index = rng.choice(self._entries)
                turns.append((self.question(index), self.faq.entries[index].answer))
                more = self.faq.entries[index].more
        return turns

    def system(self, characters: int) -> str | None:
        """A system message of up to about ``characters`` characters, or none."""
        rng = self.rng
        if characters <= 0:
            return None
        parts = [rng.choice(SYSTEM_MESSAGES)]
        while sum(map(len, parts)) < characters:
            parts.append(rng.choice(self.faq.entries).answer)
        return rng.choice((" ", "\n", "\n\n", "\n- ")).join(parts)

    def opening(self) -> list[Span]:
        """A question and the first words of its answer: all that is needed to learn which answer it is.

        Most stand alone, since they cost least; the others stand behind a conversation or a system message
        of any length, or without chat markup.
        """
        rng = self.rng
        *before, (question, answer) = self.turns(1 + rng.choices(range(6), (70, 10, 7, 5, 4, 4))[0])
        start = " ".join(answer.split(" ")[:7])
        if not before and rng.random() < 0.15:
            return [(f"Q: {question}\nA:", False), (" " + start, True)]
        length = rng.choices((0, 1, 300, 1000, 2600), (0.66, 0.24, 0.06, 0.03, 0.01))[0]
        system = self.system(rng.randint(1, length) if length else 0)
        return [(chat_prompt(before, question, system), False), (start, True)]

    def chat(self) -> list[Span]:
        """A chat of one to six turns; every answer is trained."""
        rng = self.rng
        turns = self.turns(rng.choices(range(1, 7), (50, 16, 12, 9, 7, 6))[0])
        length = rng.choices((0, 1, 300, 1000, 2600), (0.44, 0.38, 0.10, 0.05, 0.03))[0]
        return chat_spans(turns, self.system(rng.randint(1, length) if length else 0))

    def plain(self) -> list[Span]:
        """A statement, or a list of questions and answers, without chat markup."""
        rng = self.rng
        if rng.random() < 0.5:
            words = rng.choice(self.facts).answer.split(" ")
            # The first words alone cannot tell which fact follows, so they are not trained.
            return [(" ".join(words[:2]), False), (" " + " ".join(words[2:]) + END_OF_TEXT, True)]
        spans: list[Span] = []
        turns = self.turns(rng.choice((1, 1, 2)))
        for question, answer in turns:
            spans += [(f"Q: {question}\nA:", False), (" " + answer, True), ("\n", False)]
        return [*spans[:-1], (END_OF_TEXT, True)]

    def __iter__(self) -> Iterator[list[Span]]:
        while True:
            yield self.rng.choices((self.opening, self.chat, self.plain), (0.74, 0.16, 0.10))[0]()


def chat_prompt(turns: list[Turn], question: str, system: str | None = None) -> str:
    """The prompt of a chat request, as the chat template renders it."""
    text = "".join(text for text, _ in chat_spans(turns, system))
    return text + f"{IM_START}user\n{question}{IM_END}\n{IM_START}assistant\n"


def chat_spans(turns: list[Turn], system: str | None) -> list[Span]:
    """A whole chat in ChatML; only the answers and their end marks are trained."""
    spans: list[Span] = [(f"{IM_START}system\n{system}{IM_END}\n", False)] if system else []
    for question, answer in turns:
        spans.append((f"{IM_START}user\n{question}{IM_END}\n{IM_START}assistant\n", False))
        spans += [(answer + IM_END, True), ("\n", False)]
    return spans
