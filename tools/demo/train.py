"""Train the bundled demo model from scratch on the FAQ in this folder: CPU only, seeded, minutes.

    python tools/demo/train.py                      train, write penstock/assets/demo, evaluate
    python tools/demo/train.py --evaluate           evaluate the checkpoint in penstock/assets/demo
    python tools/demo/train.py --start-from A --steps 500 --lr 3e-3 --out B    go on from a checkpoint
    python tools/demo/train.py --average 0.2=A 0.8=B --out C    the mean of checkpoints
    python tools/demo/train.py --steps 500 --out /tmp/demo    a quick, weaker model

Needs torch, transformers, tokenizers, safetensors and PyYAML. The network is Qwen3 at toy size: 2 million
parameters with tied embeddings. Only answers are trained, so the model never learns to ask questions itself.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from corpus import (
    END_OF_TEXT,
    IM_END,
    IM_START,
    PATTERNS,
    SPECIAL_TOKENS,
    SYSTEM_MESSAGES,
    Faq,
    Sampler,
    Span,
    Turn,
    chat_prompt,
    held_out_questions,
    load_faq,
)
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tool_talk import ToolSampler
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

DEFAULT_OUT = Path(__file__).resolve().parents[2] / "penstock" / "assets" / "demo"
VOCAB_SIZE = 2048
IGNORE = -100

MODEL: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "sliding_window": None,
    "use_sliding_window": False,
    "max_window_layers": 4,
    "tie_word_embeddings": True,
    "use_cache": True,
    "initializer_range": 0.02,
    "bos_token_id": None,
    "torch_dtype": "bfloat16",
}

CHAT_TEMPLATE = """\
{%- macro text(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content -%}
        {{- content | map(attribute='text') | join -}}
    {%- endif -%}
{%- endmacro -%}
{%- set start = 0 %}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {%- set start = 1 %}
        {{- text(messages[0].content) + '\\n\\n' }}
    {%- endif %}
    {{- 'Tools: ' }}
    {%- for tool in tools %}
        {%- set function = tool.function if tool.function is defined else tool %}
        {%- set properties = (function.parameters or {}).properties or {} %}
        {{- (', ' if not loop.first else '') + function.name + '(' + properties.keys() | join(', ') + ')' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages[start:] %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\\n' if loop.first or loop.previtem.role != 'tool' else '\\n' }}
        {{- '<tool_response>\\n' + text(message.content) + '\\n</tool_response>' }}
        {{- '<|im_end|>\\n' if loop.last or loop.nextitem.role != 'tool' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + text(message.content) }}
        {%- for call in message.tool_calls or [] %}
            {%- set function = call.function if call.function is defined else call %}
            {{- '\\n' if message.content or not loop.first }}
            {{- '<tool_call>\\n{"name": "' + function.name + '", "arguments": ' }}
            {{- (function.arguments if function.arguments is string else function.arguments | tojson) }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# Qwen's word pattern: contractions, words with one leading mark, single digits, punctuation, white space.
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(faq: Faq) -> Tokenizer:
    """Byte-level BPE over the FAQ. No normaliser: every UTF-8 text comes back byte for byte."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    texts: list[str] = [*PATTERNS, *SYSTEM_MESSAGES, *faq.out_of_scope.questions, *faq.out_of_scope.words]
    texts += [*faq.out_of_scope.near_questions, *faq.out_of_scope.near_names]
    for entry in faq.entries:
        # Answers count twice: they decide the length of an answer, which is what people wait for.
        texts += [*entry.questions, entry.answer, entry.answer, entry.more or ""]
        texts += [question.lower() for question in entry.questions]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, spans: list[Span]) -> tuple[list[int], list[int]]:
    """Token ids, and labels that are IGNORE where the text is given and not written by the model."""
    ids: list[int] = []
    labels: list[int] = []
    for text, trained in spans:
        piece = tokenizer.encode(text, add_special_tokens=False).ids
        ids += piece
        labels += piece if trained else [IGNORE] * len(piece)
    return ids, labels


Batch = tuple[torch.Tensor, torch.Tensor]


def pad(samples: list[tuple[list[int], list[int]]]) -> Batch:
    """Pad on the right. Attention is causal, so the padding is never looked at and needs no mask."""
    width = max(len(ids) for ids, _ in samples)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in samples])
    labels = torch.tensor([labels + [IGNORE] * (width - len(labels)) for _, labels in samples])
    return ids, labels


def samples(faq: Faq, seed: int, with_tools: float) -> Iterator[list[Span]]:
    """Endless chats and texts, of which the share ``with_tools`` has tools."""
    sampler = Sampler(faq, seed)
    plain, talks, rng = iter(sampler), ToolSampler(sampler), sampler.rng
    while True:
        yield talks.talk() if rng.random() < with_tools else next(plain)


def batches(
    source: Iterator[list[Span]], tokenizer: Tokenizer, token_budget: int, seed: int, pool: int = 512
) -> Iterator[Batch]:
    """Endless batches of about ``token_budget`` tokens, each of samples of similar length."""
    shuffler = random.Random(seed)
    while True:
        drawn = [encode(tokenizer, spans) for spans in islice(source, pool)]
        drawn = sorted((s for s in drawn if len(s[0]) <= 1024), key=lambda s: len(s[0]))
        groups: list[list[tuple[list[int], list[int]]]] = [[]]
        for sample in drawn:
            if groups[-1] and len(sample[0]) * (len(groups[-1]) + 1) > token_budget:
                groups.append([])
            groups[-1].append(sample)
        shuffler.shuffle(groups)
        for group in groups:
            yield pad(group)


def answer_logits(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and targets at the trained positions only: most of the vocabulary product is never needed."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    wanted = labels[:, 1:] != IGNORE
    return model.lm_head(hidden[wanted]), labels[:, 1:][wanted]


def build() -> Any:
    """A fresh model. Eager attention, because the fused CPU kernel is slow in its backward pass."""
    config = Qwen3Config(**{key: value for key, value in MODEL.items() if key != "torch_dtype"})
    config._attn_implementation = "eager"
    return Qwen3ForCausalLM(config).train()


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024), as torch's with ``adjust_lr_fn="match_rms_adamw"``: it shares AdamW's rate.

    Its products are of type ``dtype``. Torch's are always bfloat16, and four fifths of a training step on a
    processor without bfloat16 arithmetic."""

    def __init__(self, matrices: list[Any], lr: float, weight_decay: float, dtype: torch.dtype) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})
        self.dtype = dtype

    def orthogonal(self, matrix: torch.Tensor) -> torch.Tensor:
        """Nearly the closest matrix with orthonormal rows (or columns), by five Newton-Schulz iterations."""
        x = (matrix.T if matrix.shape[0] > matrix.shape[1] else matrix).to(self.dtype)
        x = x / x.norm().clamp(min=1e-7)
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        return (x.T if matrix.shape[0] > matrix.shape[1] else x).to(matrix.dtype)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # never with a closure
        """One update of every matrix, with Nesterov momentum."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for matrix in group["params"]:
                average = self.state[matrix].setdefault("average", torch.zeros_like(matrix))
                average.lerp_(matrix.grad, 1 - momentum)
                update = self.orthogonal(matrix.grad.lerp(average, momentum))
                matrix.mul_(1 - lr * group["weight_decay"])
                matrix.sub_(update, alpha=lr * 0.2 * math.sqrt(max(matrix.shape)))


def train(faq: Faq, tokenizer: Tokenizer, args: argparse.Namespace) -> Any:
    """Muon for the matrices, AdamW for the rest, warm-up and cosine decay. Returns the float32 model."""
    torch.manual_seed(args.seed)
    model = build()
    if args.start_from is not None:
        model.load_state_dict(load(args.start_from, torch.float32)[0].state_dict())
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    optimisers: list[torch.optim.Optimizer] = [
        # Muon needs about half the steps of AdamW here.
        Muon(matrices, args.lr, weight_decay=0.05, dtype=torch.bfloat16 if args.autocast else torch.float32),
        torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.97), weight_decay=0.0),
    ]
    stream = batches(samples(faq, args.seed, args.with_tools), tokenizer, args.tokens, args.seed)
    start, recent, seen = time.monotonic(), 0.0, 0
    for step in range(args.steps):
        warm_up = min(1.0, (step + 1) / 60)
        rate = args.lr * warm_up * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        for group in [group for optimiser in optimisers for group in optimiser.param_groups]:
            group["lr"] = rate
        ids, labels = next(stream)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.autocast):
            logits, targets = answer_logits(model, ids, labels)
        loss = F.cross_entropy(logits.float(), targets)
        model.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
        recent += loss.item()
        seen += ids.numel()
        if (step + 1) % args.report == 0:
            spent = time.monotonic() - start
            speed = f"{seen / spent:,.0f} tok/s  {spent:.0f} s"
            print(f"step {step + 1:5d}  loss {recent / args.report:.4f}  {speed}", flush=True)
            recent = 0.0
    return model


def save(model: Any, tokenizer: Tokenizer, out: Path) -> None:
    """Write a Hugging Face checkpoint: bfloat16 weights, tokenizer, chat template, generation defaults."""
    out.mkdir(parents=True, exist_ok=True)
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    del weights["lm_head.weight"]  # tied to the embeddings
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # safetensors writes it for the owner only
    tokenizer.save(str(out / "tokenizer.json"))
    plain = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    special = {str(number): {"content": token, "special": True} | plain for token, number in ids.items()}
    files: dict[str, dict[str, Any]] = {
        "config.json": MODEL | {"eos_token_id": ids[IM_END], "pad_token_id": ids[END_OF_TEXT]},
        "generation_config.json": {
            "do_sample": False,
            "eos_token_id": [ids[IM_END], ids[END_OF_TEXT]],
            "pad_token_id": ids[END_OF_TEXT],
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_prefix_space": False,
            "added_tokens_decoder": special,
            "additional_special_tokens": [IM_START, IM_END],
            "bos_token": None,
            "eos_token": IM_END,
            "pad_token": END_OF_TEXT,
            "unk_token": None,
            "clean_up_tokenization_spaces": False,
            "model_max_length": MODEL["max_position_embeddings"],
            "chat_template": CHAT_TEMPLATE,
        },
        "special_tokens_map.json": {
            "additional_special_tokens": [IM_START, IM_END],
            "eos_token": IM_END,
            "pad_token": END_OF_TEXT,
        },
    }
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load(folder: Path, dtype: torch.dtype) -> tuple[Any, Tokenizer]:
    """Load a checkpoint the way any user of transformers would."""
    model: Any = Qwen3ForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval(), Tokenizer.from_file(str(folder / "tokenizer.json"))


def average(parts: list[str]) -> Any:
    """The weighted mean of checkpoints given as SHARE=FOLDER.

    That of a model and those that went on from it keeps what the first knew, and most of what they learnt
    (Wortsman et al., 2022).
    """
    shares = [(float(share), Path(folder)) for share, _, folder in (part.partition("=") for part in parts)]
    if abs(sum(share for share, _ in shares) - 1) > 1e-6:
        raise SystemExit(f"--average: the shares of {' '.join(parts)} must add up to 1")
    weights = [(share, load(folder, torch.float32)[0].state_dict()) for share, folder in shares]
    model = build()
    model.load_state_dict(
        {name: sum(share * part[name] for share, part in weights) for name in weights[0][1]}
    )
    return model


Case = tuple[str, str]
"""A prompt and the exact text that should follow."""


def cases(faq: Faq) -> dict[str, list[Case]]:
    """Every kind of prompt that the README reports on. Held-out questions were never trained."""
    sampler = Sampler(faq, seed=20_000)
    rng, scope = sampler.rng, faq.out_of_scope
    answers = [(q, e.answer, q in held_out_questions(e)) for e in faq.entries for q in e.questions]

    def chats(turns: int, system_characters: int) -> list[Case]:
        found = []
        for _ in range(150):
            *before, (question, answer) = sampler.turns(turns)
            found.append((chat_prompt(before, question, sampler.system(system_characters)), answer))
        return found

    def alone(pairs: list[Turn]) -> list[Case]:
        return [(chat_prompt([], q, rng.choice((None, *SYSTEM_MESSAGES[:3]))), a) for q, a in pairs]

    facts = [entry.answer.split(" ") for entry in sampler.facts if entry.terms]
    completions = [(" ".join(words[:5]), " " + " ".join(words[5:])) for words in facts]
    tooled: dict[str, list[Case]] = {}
    for held_out in (False, True):
        suffix = ", held out" if held_out else ""
        for kind, prompt, answer in ToolSampler(sampler, held_out=held_out).cases(60):
            tooled.setdefault(kind + suffix, []).append((prompt, answer))
    return {
        **tooled,
        "trained questions, a sample": alone(
            rng.sample([(q, a) for q, a, held_out in answers if not held_out], 600)
        ),
        "held-out paraphrases": alone([(q, a) for q, a, held_out in answers if held_out]),
        "out of scope, trained": alone([(q, scope.answer) for q in scope.questions]),
        "out of scope, held out": alone([(q, scope.answer) for q in scope.held_out]),
        "near the FAQ, trained": alone([(q, scope.answer) for q in scope.near_questions]),
        "near the FAQ, held out": alone([(q, scope.answer) for q in scope.near_held_out]),
        "near the FAQ, for tuning": alone([(q, scope.answer) for q in scope.near_tuning]),
        "last answer of 3 turns": chats(3, 0),
        "last answer of 2 turns, short system message": chats(2, 100),
        "one turn, system message of about 600 tokens": chats(1, 2400),
        "Q: ... A: completion": [(f"Q: {e.question}\nA:", " " + e.answer) for e in faq.entries],
        "completion of a fact from its first five words": completions,
    }


@torch.inference_mode()
def are_greedy(model: Any, tokenizer: Tokenizer, group: list[Case]) -> list[bool]:
    """Whether each text is the greedy answer to its prompt, found in one pass per batch.

    An answer is greedy exactly when each of its tokens is the argmax after the ones before it.
    """
    found: list[bool] = []
    for start in range(0, len(group), 64):
        rows = []
        for prompt, answer in group[start : start + 64]:
            end = IM_END if prompt.startswith(IM_START) else END_OF_TEXT
            rows.append(encode(tokenizer, [(prompt, False), (answer + end, True)]))
        ids, labels = pad(rows)
        logits, targets = answer_logits(model, ids, labels)
        wrong = torch.zeros(labels[:, 1:].shape, dtype=torch.bool)
        wrong[labels[:, 1:] != IGNORE] = logits.argmax(-1) != targets
        found += (~wrong.any(1)).tolist()
    return found


@torch.inference_mode()
def answers_of(model: Any, tokenizer: Tokenizer, prompts: list[str]) -> list[str]:
    """Greedy answers by transformers' generate, in batches padded on the left."""
    encoded = [tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    texts = [""] * len(prompts)
    for start in range(0, len(order), 64):
        chosen = order[start : start + 64]
        width = max(len(encoded[i]) for i in chosen)
        ids = torch.tensor([[0] * (width - len(encoded[i])) + encoded[i] for i in chosen])
        mask = torch.tensor([[0] * (width - len(encoded[i])) + [1] * len(encoded[i]) for i in chosen])
        made = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=120, do_sample=False)
        for i, row in zip(chosen, made[:, width:].tolist(), strict=True):
            texts[i] = tokenizer.decode(row, skip_special_tokens=True)
    return texts


def evaluate(faq: Faq, folder: Path, show_errors: bool) -> None:
    """Print the share of exact greedy answers of each kind, computed in float32 and in bfloat16; and what the
    others are in float32: "I do not know", or another answer of the FAQ (or none at all)."""
    computed = {str(dtype)[6:]: load(folder, dtype) for dtype in (torch.float32, torch.bfloat16)}
    columns = (*computed, "declined", "another")
    print(f"{'kind of prompt':48s} {'count':>6s} " + " ".join(f"{name:>9s}" for name in columns))
    for kind, group in cases(faq).items():
        right = {name: are_greedy(*loaded, group) for name, loaded in computed.items()}
        wrong = [case for case, greedy in zip(group, right["float32"], strict=True) if not greedy]
        prompts = [prompt for prompt, _ in wrong]
        declined = sum(are_greedy(*computed["float32"], [(p, faq.out_of_scope.answer) for p in prompts]))
        if show_errors:
            texts = answers_of(*computed["float32"], prompts)
            for prompt, text in zip(prompts, texts, strict=True):
                print(f"  WRONG {prompt[-160:]!r}\n     -> {text!r}")
        counts = (*map(sum, right.values()), declined, len(wrong) - declined)
        figures = " ".join(f"{count / len(group):9.1%}" for count in counts)
        print(f"{kind:48s} {len(group):6d} {figures}", flush=True)


def main() -> None:
    """Read the command line, then train and evaluate or only evaluate."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder of the checkpoint")
    parser.add_argument("--start-from", type=Path, help="checkpoint to go on from, instead of from scratch")
    parser.add_argument("--average", nargs="+", metavar="SHARE=FOLDER", help="instead: mean of checkpoints")
    parser.add_argument("--evaluate", action="store_true", help="only evaluate the checkpoint in --out")
    parser.add_argument("--show-errors", action="store_true", help="print every wrong answer")
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per step, padding included")
    parser.add_argument("--with-tools", type=float, default=0.35, help="share of the chats with tools")
    parser.add_argument("--lr", type=float, default=1e-2, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", type=int, default=50, help="print the loss every so many steps")
    parser.add_argument("--float32", dest="autocast", action="store_false", help="no bfloat16 arithmetic")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    faq = load_faq()
    if args.average:
        tokenizer = load(Path(args.average[0].partition("=")[2]), torch.float32)[1]
        save(average(args.average), tokenizer, args.out)
    elif not args.evaluate:
        start = args.start_from
        tokenizer = train_tokenizer(faq) if start is None else load(start, torch.float32)[1]
        save(train(faq, tokenizer, args), tokenizer, args.out)
    evaluate(faq, args.out, args.show_errors)


if __name__ == "__main__":
    main()
