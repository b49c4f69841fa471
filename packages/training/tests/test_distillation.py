"""Distillation losses of logits: values, gradients, masks, temperatures, and what TVD++ is."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fairlead.errors import InputError
from fairlead_training import fkl, gkd, rkl, tvd, tvdpp, tvdpp_sampled
from fairlead_training.objectives.distillation import DISTILLATION

STUDENT = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]], dtype=torch.float64)
TEACHER = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]], dtype=torch.float64)
EXACT = ("fkl", "rkl", "gkd", "tvd", "tvdpp")


def random_logits(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return tuple(2 * torch.randn(*shape, generator=g, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


def gradient(name: str, student: torch.Tensor, teacher: torch.Tensor, **settings: object) -> torch.Tensor:
    leaf = student.clone().requires_grad_(True)
    DISTILLATION[name](leaf, teacher, **settings).backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize(("beta", "value"), [(0, 0.499022), (0.1, 0.042367), (0.5, 0.103647), (1, 0.397713)])
def test_gkd_interpolates_between_its_two_ends_with_a_jump(beta: float, value: float) -> None:
    assert float(gkd(STUDENT.log(), TEACHER.log(), beta=beta)) == pytest.approx(value, abs=1e-6)


def test_gkds_slope_at_zero_is_the_forward_kl() -> None:
    small = 1e-7
    assert float(gkd(STUDENT.log(), TEACHER.log(), beta=small)) / small == pytest.approx(float(fkl(STUDENT.log(), TEACHER.log())), rel=1e-4)


def test_kl_is_torchs() -> None:
    student, teacher = random_logits(2, 3, 7)
    lp, lq = student.log_softmax(-1), teacher.log_softmax(-1)
    torch.testing.assert_close(fkl(student, teacher), torch.nn.functional.kl_div(lp, lq, log_target=True, reduction="sum") / 6)
    torch.testing.assert_close(rkl(student, teacher), torch.nn.functional.kl_div(lq, lp, log_target=True, reduction="sum") / 6)
    middle = torch.log((lp.exp() + lq.exp()) / 2)
    jsd = sum(torch.nn.functional.kl_div(middle, x, log_target=True, reduction="sum") for x in (lp, lq)) / 12
    torch.testing.assert_close(gkd(student, teacher), jsd)


@pytest.mark.parametrize(
    ("teacher", "student", "value", "grad"),
    [((0.5, 0.3, 0.2), (0.2, 0.5, 0.3), 0.3, (-0.16, 0.10, 0.06)), ((0.2, 0.25, 0.55), (0.5, 0.3, 0.2), 0.35, (0.10, 0.06, -0.16))],
)
def test_tvd_is_what_speculative_sampling_refuses(teacher: tuple[float, ...], student: tuple[float, ...], value: float, grad: tuple[float, ...]) -> None:
    p, q = torch.tensor([student], dtype=torch.float64), torch.tensor([teacher], dtype=torch.float64)
    assert float(tvd(p.log(), q.log())) == pytest.approx(value) == pytest.approx(1 - float(torch.minimum(p, q).sum()))
    assert gradient("tvd", p.log(), q.log())[0].tolist() == pytest.approx(grad)
    reward = (q > p).to(p.dtype)
    assert (p * ((p * reward).sum() - reward))[0].tolist() == pytest.approx(grad)


def test_tvd_is_symmetric_and_below_pinskers_bound() -> None:
    student, teacher = random_logits(5, 4, 9)
    each = tvd(student, teacher, reduction="none")
    torch.testing.assert_close(each, tvd(teacher, student, reduction="none"))
    for kl in (fkl, rkl):
        assert bool((each <= (kl(student, teacher, reduction="none") / 2).sqrt()).all())


def test_over_the_whole_vocabulary_tvdpp_is_tvd_divided_by_sigma() -> None:
    student, teacher = random_logits(2, 3, 7)
    mask = torch.tensor([[True, True, False], [True, False, True]])
    reward = (teacher.log_softmax(-1) > student.log_softmax(-1)).to(torch.float64)
    sigma = reward[mask].std(correction=0)
    torch.testing.assert_close(gradient("tvdpp", student, teacher, mask=mask), gradient("tvd", student, teacher, mask=mask) / sigma, rtol=1e-10, atol=1e-13)
    assert not bool(gradient("tvdpp", student, student).any())


def test_sampled_tvdpp_is_unbiased_with_its_leave_one_out_baseline() -> None:
    p, q = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64), torch.tensor([[0.2, 0.25, 0.55]], dtype=torch.float64)
    exact = gradient("tvd", p.log(), q.log())[0]
    generator = torch.Generator().manual_seed(0)
    found: dict[str, tuple[torch.Tensor, float]] = {}
    for baseline in ("leave-one-out", "none", "mean"):
        draws = torch.stack(
            [gradient("tvdpp-sampled", p.log(), q.log(), samples=8, scale=False, baseline=baseline, generator=generator)[0] for _ in range(2000)]
        )
        found[baseline] = draws.mean(0), float(draws.var(0).sum())
        expected = exact * (7 / 8 if baseline == "mean" else 1)
        assert bool(((draws.mean(0) - expected).abs() < 4 * draws.std(0) / math.sqrt(2000)).all()), baseline
    # exact variances, by enumeration: 0.0153714, 0.0196, 0.0117688
    assert [found[k][1] for k in ("leave-one-out", "none", "mean")] == pytest.approx([0.0153714, 0.0196, 0.0117688], rel=0.1)


@pytest.mark.parametrize("name", [n for n in EXACT if n != "tvdpp"])  # a surrogate's value means nothing
def test_gradients_pass_gradcheck(name: str) -> None:
    student, teacher = random_logits(2, 3, 5)
    mask = torch.tensor([[True, True, False], [True, False, True]])
    assert torch.autograd.gradcheck(lambda x: DISTILLATION[name](x, teacher, mask, temperature=0.7), student.requires_grad_(True))


@pytest.mark.parametrize("name", EXACT)
def test_masked_positions_count_for_nothing(name: str) -> None:
    student, teacher = random_logits(2, 3, 5)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    loss = DISTILLATION[name]
    grad = gradient(name, student, teacher, mask=mask)
    assert not bool(grad[~mask].any())
    changed = torch.where(mask[..., None], student, -student)
    torch.testing.assert_close(loss(changed, teacher, mask), loss(student, teacher, mask))
    wider = [torch.cat([x, torch.ones(2, 4, 5, dtype=x.dtype)], 1) for x in (student, teacher)]
    padded = torch.cat([mask, torch.zeros(2, 4, dtype=torch.bool)], 1)
    torch.testing.assert_close(loss(*wider, padded), loss(student, teacher, mask))
    each = loss(student, teacher, mask, reduction="none")
    torch.testing.assert_close(loss(student, teacher, mask), each.sum() / 3)
    torch.testing.assert_close(loss(student, teacher, mask, reduction="sequence_mean"), (each[0].sum() / 2 + each[1].sum()) / 2)
    with pytest.warns(UserWarning, match="no position"):
        nothing = student.clone().requires_grad_(True)
        loss(nothing, teacher, torch.zeros_like(mask)).backward()
    assert nothing.grad is not None and not bool(nothing.grad.any())


@pytest.mark.parametrize("name", EXACT)
def test_a_temperature_divides_both_logits(name: str) -> None:
    student, teacher = random_logits(2, 3, 5)
    loss = DISTILLATION[name]
    torch.testing.assert_close(loss(student, teacher, temperature=2.0), loss(student / 2, teacher / 2))
    torch.testing.assert_close(gradient(name, student, teacher, temperature=2.0), gradient(name, student / 2, teacher / 2) / 2)


@pytest.mark.parametrize(("name", "dtype"), itertools.product(EXACT, (torch.float32, torch.bfloat16)))
def test_impossible_and_extreme_tokens_give_finite_losses(name: str, dtype: torch.dtype) -> None:
    student = torch.tensor([[1e4, 0.0, -1e4, 3.0], [0.0, 0.0, 0.0, 0.0]], dtype=dtype)
    teacher = torch.tensor([[0.0, 1e4, -1e4, 2.0], [1.0, 2.0, -1e4, 0.0]], dtype=dtype)
    assert bool(DISTILLATION[name](student, teacher).isfinite()) and bool(gradient(name, student, teacher).isfinite().all())
    cut = torch.tensor([[0.0, 1.0, -torch.inf, 2.0], [1.0, -torch.inf, -torch.inf, 0.0]], dtype=dtype)
    if name != "rkl":  # infinite by definition where the teacher excludes a token
        assert bool(DISTILLATION[name](student, cut).isfinite()) and bool(gradient(name, student, cut).isfinite().all())


def test_a_padded_vocabulary_must_be_masked_out() -> None:
    student, teacher = random_logits(2, 3, 5)
    padded = torch.cat([teacher, torch.full((2, 3, 2), -torch.inf, dtype=torch.float64)], -1)
    torch.testing.assert_close(tvd(student, padded), tvd(student, teacher))
    with pytest.raises(InputError, match="mask the tail"):
        tvd(student, torch.cat([teacher, torch.zeros(2, 3, 2, dtype=torch.float64)], -1))


def test_bad_input_is_refused_in_one_line() -> None:
    student, teacher = random_logits(2, 3, 5)
    for call, match in (
        (lambda: fkl(student, teacher * math.nan), "not be NaN"),
        (lambda: fkl(student, teacher[:1]), "shape"),
        (lambda: rkl(student, teacher, torch.ones(2, dtype=torch.bool)), "mask"),
        (lambda: tvd(student, teacher, temperature=0), "temperature"),
        (lambda: gkd(student, teacher, beta=1.5), "beta"),
        (lambda: tvdpp(student, teacher, reduction="sum"), "reduction"),  # type: ignore[arg-type]
        (lambda: tvdpp_sampled(student, teacher, samples=0), "samples"),
    ):
        with pytest.raises(InputError, match=match) as error:
            call()
        assert "\n" not in str(error.value)
