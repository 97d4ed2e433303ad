"""Each entry of a table on numbers that can be reckoned by hand, the specification's own as well."""

from __future__ import annotations

import math

import pytest
import torch

from penstock.core.errors import StartupError
from penstock.kernels import create as create_module
from penstock.kernels.attention import Span, StepLayout
from penstock.kernels.create import create_operations
from penstock.kernels.operations import Draw, Operations, ascending
from penstock.kernels.quantization import SCHEMES
from penstock.kernels.reference import ReferenceMatrix, paged_attention, reference_operations, write_kv
from penstock.kernels.torch_operations import torch_operations

CPU = torch.device("cpu")
TABLES = {"reference": reference_operations, "torch": torch_operations}


@pytest.fixture(params=list(TABLES))
def table(request: pytest.FixtureRequest) -> Operations:
    made: Operations = TABLES[request.param](CPU, torch.float32)
    assert (made.name, made.device, made.dtype) == (request.param, CPU, torch.float32)
    assert made.stack is None
    assert made.schemes == (SCHEMES if request.param == "reference" else ())
    return made


def test_rows_of_a_table(table: Operations) -> None:
    weights = torch.arange(12.0).view(4, 3)
    assert table.embed(torch.tensor([2, 0, 2]), weights).tolist() == [[6, 7, 8], [0, 1, 2], [6, 7, 8]]


def test_norms(table: Operations) -> None:
    x = torch.tensor([[3.0, -4.0], [0.0, 0.0]])
    weight, bias = torch.tensor([2.0, 10.0]), torch.tensor([0.5, -1.0])
    got = table.rms_norm(x, weight, 12.5)
    assert got.tolist() == [[pytest.approx(2 * 3 / 5), pytest.approx(10 * -4 / 5)], [0.0, 0.0]]
    # the mean is -0.5, the deviations are 3.5, and 12.25 with 3.75 is 16
    got = table.layer_norm(x, weight, bias, 3.75)
    assert got[0].tolist() == pytest.approx([2 * 3.5 / 4 + 0.5, 10 * -3.5 / 4 - 1.0])
    assert got[1].tolist() == [0.5, -1.0]


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu"])
def test_activations_and_gates(table: Operations, kind: str) -> None:
    def by_hand(x: float) -> float:
        if kind == "silu":
            return x / (1 + math.exp(-x))
        if kind == "relu":
            return max(x, 0.0)
        if kind == "gelu":
            return x * (1 + math.erf(x / math.sqrt(2))) / 2
        return x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2

    values = [-3.0, -0.5, 0.0, 1.0, 2.5, 8.0]
    wanted = [by_hand(value) for value in values]
    got = table.activation(kind)(torch.tensor(values))  # type: ignore[arg-type]
    assert got.tolist() == pytest.approx(wanted, abs=1e-6)
    pairs = torch.tensor([values[:3] + values[3:], values[3:] + values[:3]])
    gated = table.gate(kind)(pairs)  # type: ignore[arg-type]
    assert gated[0].tolist() == pytest.approx(
        [a * b for a, b in zip(wanted[:3], values[3:], strict=True)], abs=1e-6
    )
    assert gated[1].tolist() == pytest.approx(
        [a * b for a, b in zip(wanted[3:], values[:3], strict=True)], abs=1e-6
    )


@pytest.mark.parametrize("width", [4, 6])
@pytest.mark.parametrize("heads", [3, 4])  # four: as many as numbers that are turned
@pytest.mark.parametrize("normed", [False, True])
def test_pairs_are_turned_by_their_angle_and_the_rest_stays(
    table: Operations, width: int, heads: int, normed: bool
) -> None:
    x = torch.arange(1.0, 1 + 2 * heads * width).view(2, heads, width)
    angles = torch.tensor([[0.1, 0.2], [1.0, -2.0]])
    cos = torch.cat((angles.cos(), angles.cos()), -1)[:, None]
    sin = torch.cat((-angles.sin(), angles.sin()), -1)[:, None]
    weight = torch.rand(heads, width) + 0.5 if normed else None
    before = x.clone()
    if weight is not None:
        before = before / (before.square().mean(-1, keepdim=True) + 0.25).sqrt() * weight
    got = table.rotate(x.clone(), (cos, sin), weight, 0.25)
    for token in range(2):
        for head in range(heads):
            row, out = before[token, head], got[token, head]
            for pair in range(2):
                turned = complex(row[pair], row[pair + 2]) * complex(
                    math.cos(angles[token, pair]), math.sin(angles[token, pair])
                )
                assert out[pair].item() == pytest.approx(turned.real, rel=1e-4, abs=1e-5)
                assert out[pair + 2].item() == pytest.approx(turned.imag, rel=1e-4, abs=1e-5)
            assert out[4:].tolist() == pytest.approx(row[4:].tolist())


def test_products(table: Operations) -> None:
    weight = torch.tensor([[1.0, 2.0], [0.0, -1.0], [5.0, 5.0]])
    matrix = table.linear(weight, None)
    x = torch.tensor([[1.0, 10.0]])
    assert matrix(x, None).tolist() == [[21.0, -10.0, 55.0]]
    assert matrix(x, torch.tensor([1.0, 2.0, 3.0])).tolist() == [[22.0, -8.0, 58.0]]
    assert (matrix.nbytes, matrix.copied) == (24, False)


def test_products_of_rounded_weights_and_activations() -> None:
    weight = torch.tensor([[127.0, 1.4], [127.0, -2.6]])
    x = torch.tensor([[127.0, 0.6]])
    exact = ReferenceMatrix(weight, "int8")
    assert exact.copied
    assert exact(x, None).tolist() == [pytest.approx([127.0**2 + 0.6, 127.0**2 - 1.8])]
    rounded = ReferenceMatrix(weight, "w8a8")
    assert rounded(x, torch.tensor([1.0, 0.0])).tolist() == [[127.0**2 + 2, 127.0**2 - 3]]
    with pytest.raises(ValueError, match="int2"):
        ReferenceMatrix(weight, "int2")
    with pytest.raises(ValueError, match="int8 on cpu needs the CPU kernels"):
        torch_operations(CPU, torch.float32).linear(weight, "int8")


def test_keys_lie_in_their_slots() -> None:
    keys, values = torch.zeros(2, 3, 1, 4, 2)
    k, v = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]]), torch.tensor([[[5.0, 6.0]], [[7.0, 8.0]]])
    write_kv(k, v, keys, values, [9, 3])
    assert keys[2, 0, 1].tolist() == [1.0, 2.0]
    assert keys[0, 0, 3].tolist() == [3.0, 4.0]
    assert values[2, 0, 1].tolist() == [5.0, 6.0]
    assert keys.count_nonzero() == values.count_nonzero() == 4


@pytest.mark.parametrize(("window", "seen"), [(None, 3), (5, 3), (3, 3), (2, 2), (1, 1)])
def test_equal_scores_give_the_mean_of_the_values_that_are_seen(window: int | None, seen: int) -> None:
    """Two query heads read one of keys; scores are equal where queries are zero."""
    keys, values = torch.zeros(2, 2, 1, 2, 2)
    layout = StepLayout([Span(2, 1, [1, 0])], 2)
    write_kv(
        torch.ones(3, 1, 2), torch.tensor([[[1.0, 0.0]], [[2.0, 0.0]], [[6.0, 3.0]]]), keys, values, [2, 3, 0]
    )
    out = paged_attention(torch.zeros(1, 2, 2), keys, values, layout, 1.0, window)
    mean = [sum([1.0, 2.0, 6.0][3 - seen :]) / seen, 3.0 / seen]
    assert out.tolist() == [[pytest.approx(mean), pytest.approx(mean)]]
    # a score of ln 2 more weighs twice
    keys[0, 0, 0] = torch.tensor([math.log(2) / 0.5, 0.0])
    keys[1] = 0.0
    out = paged_attention(torch.tensor([[[1.0, 0.0]] * 2]), keys, values, layout, 0.5, window)
    weights = [1.0, 1.0, 2.0][3 - seen :]
    wanted = sum(w * v for w, v in zip(weights, [1.0, 2.0, 6.0][3 - seen :], strict=True)) / sum(weights)
    assert out[0, 0, 0].item() == pytest.approx(wanted, rel=1e-5)


def test_likelihoods_by_hand(table: Operations) -> None:
    logits = torch.tensor([[0.0, math.log(2.0), math.log(5.0), 0.0], [1.0, 1.0, 1.0, -math.inf]])
    first, second = table.logprobs(logits, [0, 3], [3, 0])
    assert first.rank == 4, "as many are at least as probable"
    assert first.best == [2, 1, 0]
    assert first.logprob == pytest.approx(math.log(1 / 9))
    assert first.logprobs == pytest.approx([math.log(5 / 9), math.log(2 / 9), math.log(1 / 9)])
    assert (second.rank, second.best, second.logprobs) == (4, [], [])
    assert second.logprob == -math.inf
    [third] = table.logprobs(logits[1:], [1], [4])
    assert (third.rank, third.best) == (3, [0, 1, 2, 3])


@pytest.mark.parametrize(
    ("uniform", "token"), [(0.0, 0), (0.111, 0), (0.112, 1), (0.333, 1), (0.334, 2), (0.888, 2), (0.889, 3)]
)
def test_a_draw_is_by_id_where_nothing_is_cut(table: Operations, uniform: float, token: int) -> None:
    logits = torch.tensor([[0.0, math.log(2.0), math.log(5.0), 0.0]])
    tokens, checks = table.sample(logits, [Draw(uniform, 1.0)])
    assert tokens == [token]
    assert all(map(math.isfinite, checks))


@pytest.mark.parametrize(
    ("uniform", "fields", "token"),
    [
        (0.55, {"top_k": 3}, 2),
        (0.56, {"top_k": 3}, 1),
        (0.99, {"top_k": 2}, 1),
        (0.99, {"top_k": 1}, 2),
        (0.99, {"top_p": 0.55}, 2),
        (0.99, {"top_p": 0.56}, 1),
        (0.99, {"top_p": 0.78}, 0),
        (0.99, {"min_p": 0.41}, 2),
        (0.99, {"min_p": 0.39}, 2),
        (0.28, {"min_p": 0.39}, 1),
        (0.99, {"min_p": 0.39, "top_k": 4}, 1),
        (0.99, {"top_k": 4, "top_p": 0.99}, 3),
        (0.99, {"top_k": 9}, 3),
    ],
)
def test_a_draw_is_by_probability_where_the_least_are_cut(
    table: Operations, uniform: float, fields: dict[str, float], token: int
) -> None:
    """Of weights 1, 2, 5 and 1: in their order 2, 1, 0, 3."""
    logits = torch.tensor([[0.0, math.log(2.0), math.log(5.0), 0.0]])
    draw = Draw(uniform, 1.0, **fields)  # type: ignore[arg-type]
    assert table.sample(logits, [draw])[0] == [token]
    half = draw._replace(temperature=0.5)  # weights 1, 4, 25 and 1
    if fields.get("top_k") == 2:
        assert table.sample(logits, [half._replace(uniform=0.86)])[0] == [2]
        assert table.sample(logits, [half._replace(uniform=0.87)])[0] == [1]
    assert table.sample(logits, [draw._replace(temperature=0.0)])[0] == [2]


@pytest.mark.parametrize("wanted", [[0], [0, 3], [], [1, 2, 3]])
def test_rows_in_ascending_order(wanted: list[int]) -> None:
    assert ascending(wanted, 4).tolist() == wanted


@pytest.mark.parametrize("wanted", [[4], [-1], [1, 1], [2, 1]])
def test_other_rows_are_refused(wanted: list[int]) -> None:
    with pytest.raises(ValueError, match="of 4; need ascending ones"):
        ascending(wanted, 4)


# ---- which table ----


@pytest.mark.parametrize(
    ("dtype", "options", "param", "words"),
    [
        (
            torch.float32,
            {"attention": "flash"},
            "--attention-backend",
            "Choose one of auto, cpu, triton, torch, reference.",
        ),
        (
            torch.float32,
            {"attention": "torch", "batch_invariant": True},
            "--batch-invariant",
            "The attention backend 'torch' is not batch-invariant. Use --attention-backend auto, or leave",
        ),
        (
            torch.float16,
            {"attention": "cpu"},
            "--attention-backend",
            "not torch.float16 on cpu. Use --attention",
        ),
        (
            torch.float16,
            {"batch_invariant": True},
            "--batch-invariant",
            "torch.float16 on cpu is not batch-invariant",
        ),
    ],
)
def test_tables_that_there_are_not(
    dtype: torch.dtype, options: dict[str, object], param: str, words: str
) -> None:
    with pytest.raises(StartupError) as caught:
        create_operations(CPU, dtype, **options)  # type: ignore[arg-type]
    assert caught.value.param == param
    assert words in str(caught.value)


def test_without_kernels_it_is_said_what_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []

    def none(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr("penstock.kernels.cpu.library.available", none)
    assert create_operations(CPU, torch.float32).name == "torch"
    assert create_operations(CPU, torch.float32, quantized=True).name == "torch"
    assert create_operations(CPU, torch.float16).name == "torch"
    with pytest.raises(
        StartupError, match=r"The CPU kernels are not available.*--attention-backend torch does"
    ):
        create_operations(CPU, torch.bfloat16, attention="cpu")
    with pytest.raises(
        StartupError, match=r"Only the CPU kernels are batch-invariant.*leave out --batch-inv"
    ):
        create_operations(CPU, torch.bfloat16, batch_invariant=True)
    short, *patient = waited
    assert len(patient) == 3
    assert set(patient) == {max(waited)}
    assert short < max(waited), "what is worth more is waited for longer"
    for name in ("torch", "reference"):
        made = create_operations(CPU, torch.float32, attention=name)
        assert (made.name, made.stack, made.batch_invariant) == ("torch", None, False)
    assert create_module._has_kernels(CPU, torch.bfloat16)
    assert not create_module._has_kernels(torch.device("cuda"), torch.bfloat16)
