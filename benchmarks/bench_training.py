"""Preference training against TRL: the log-prob path of a DPO step, whole steps of the trainers, packed rows against padded
batches sorted by length, and references that are kept against references that are asked."""

from __future__ import annotations

import copy
import functools
import logging
import math
import tempfile
from collections.abc import Callable, Iterator
from statistics import NormalDist
from typing import Any

import torch
from harness import Row

from fairlead import registry
from fairlead.kinds import SequenceStats
from fairlead_kernels import linear_logprob

SEQUENCES, LENGTH, WIDTH = 4, 512, 512
STATISTICS = ("log_probs", "entropy", "mean_logits", "is_top1")  # what TRL's DPOTrainer asks its head for
logging.getLogger("fairlead").setLevel(logging.ERROR)


# -- the log-prob path ----------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def hidden_states(vocabulary: int, frozen: bool, sequences: int = SEQUENCES) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states of two pairs, the head's weight and the tokens; made in place, see bench_linear_logprob."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.empty(sequences * LENGTH, WIDTH).normal_(generator=generator).requires_grad_()
    weight = torch.empty(vocabulary, WIDTH).normal_(std=WIDTH**-0.5, generator=generator).requires_grad_(not frozen)
    return hidden, weight, torch.randint(0, vocabulary, (len(hidden),), generator=generator)


def our_logps(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return linear_logprob(hidden, weight, target)


def trl_logps(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

    options = (1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, STATISTICS)
    found: torch.Tensor = _ChunkedLogProbFunction.apply(hidden, weight, None, target, *options)[0]
    return found


def path(logps: Callable[..., torch.Tensor], vocabulary: int, frozen: bool, sequences: int = SEQUENCES) -> Callable[[], Any]:
    """Loss and gradients of DPO from hidden states."""
    hidden, weight, target = hidden_states(vocabulary, frozen, sequences)
    leaves = [hidden] if frozen else [hidden, weight]
    dpo = registry.create("objective", "dpo", beta=0.1)
    group, length = torch.arange(sequences) // 2, torch.full((sequences,), LENGTH)
    role = torch.tensor([1, -1] * (sequences // 2))
    reference = torch.full((sequences,), -LENGTH * math.log(vocabulary))

    def call() -> Any:
        logp = logps(hidden, weight, target).reshape(sequences, LENGTH).sum(1)
        loss = dpo(SequenceStats(logp, length, reference, group, role)).loss
        return loss.detach(), torch.autograd.grad(loss, leaves)

    return call


def check_path() -> None:
    for frozen in (False, True):
        (loss, grads), (right, wanted) = (path(logps, 5000, frozen, 2)() for logps in (our_logps, trl_logps))
        torch.testing.assert_close(loss, right, rtol=1e-4, atol=1e-4)
        for x, y in zip(grads, wanted, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4 * float(y.abs().max()))


# -- whole steps ----------------------------------------------------------------------------------------------------------


def lengths(count: int, median: float) -> list[int]:
    """Log-normal lengths, shuffled."""
    quantile = NormalDist().inv_cdf
    made = [max(1, round(median * math.exp(0.99 * quantile((i + 0.5) / count)))) for i in range(count)]
    return [made[i] for i in torch.randperm(count, generator=torch.Generator().manual_seed(1)).tolist()]


@functools.lru_cache(maxsize=1)
def model_and_pairs(vocabulary: int) -> tuple[Any, Any, list[dict[str, str]]]:
    """A Llama of the zoo's size, a word-level tokenizer and 32 pairs of skewed lengths."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<end>": 0, **{f"w{i}": i for i in range(1, vocabulary)}}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, eos_token_id=0, pad_token_id=0
    )
    generator = torch.Generator().manual_seed(0)

    def text(count: int) -> str:
        return "".join(f" w{i}" for i in torch.randint(1, vocabulary, (count,), generator=generator).tolist())

    sizes = zip(lengths(32, 30), lengths(32, 40), lengths(32, 40), strict=True)
    pairs = [{"prompt": text(p).strip(), "chosen": text(c), "rejected": text(r)} for p, c, r in sizes]
    return LlamaForCausalLM(config), tokenizer, pairs


def _arguments(kind: Any, **more: Any) -> Any:
    return kind(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True, max_steps=8,
        gradient_checkpointing=False, bf16=False, **more,
    )  # fmt: skip


def _pass(trainer: Any, batches: int = 4) -> Callable[[], list[float]]:
    """Forward and backward of some batches, in the data's order."""
    trainer.get_train_dataloader()
    rows = trainer.train_dataset
    size = trainer.args.per_device_train_batch_size
    ready = [trainer.data_collator([rows[i] for i in range(b * size, (b + 1) * size)]) for b in range(batches)]
    trainer.current_gradient_accumulation_steps = 1

    def call() -> list[float]:
        trainer.model.zero_grad()
        return [float(trainer.training_step(trainer.model, batch)) for batch in ready]

    return call


def our_step(vocabulary: int, adapter: bool = False, **settings: Any) -> Callable[[], list[float]]:
    from fairlead_training import PreferenceConfig, PreferenceTrainer

    model, tokenizer, pairs = model_and_pairs(vocabulary)
    peft_config = None
    if adapter:
        from peft import LoraConfig

        peft_config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    args = _arguments(PreferenceConfig, ref_cache_dir=tempfile.mkdtemp(), **settings)
    return _pass(PreferenceTrainer(copy.deepcopy(model), "dpo", args, pairs, processing_class=tokenizer, peft_config=peft_config))


def trl_step(vocabulary: int) -> Callable[[], list[float]]:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    model, tokenizer, pairs = model_and_pairs(vocabulary)
    args = _arguments(DPOConfig, precompute_ref_log_probs=True)
    return _pass(DPOTrainer(model=copy.deepcopy(model), args=args, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer))


def check_kept() -> None:
    found, right = our_step(1_200, True)(), our_step(1_200, True, precompute_ref_log_probs=False)()
    if max(abs(a - b) for a, b in zip(found, right, strict=True)) > 1e-5:
        raise AssertionError(f"losses with a kept and an asked reference differ: {found} and {right}")


def check_step(vocabulary: int) -> None:
    found, right = our_step(vocabulary)(), trl_step(vocabulary)()
    if max(abs(a - b) for a, b in zip(found, right, strict=True)) > 1e-4:
        raise AssertionError(f"losses of one step differ: {found} and TRL's {right}")


# -- packed against sorted ------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def skewed(count: int = 64) -> tuple[Any, list[dict[str, Any]]]:
    """A model and demonstrations of skewed lengths: median 40 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=1200, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4)
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"prompt_ids": [1], "completion_ids": [torch.randint(1, 1200, (n,), generator=generator).tolist()]} for n in lengths(count, 40)
    ]
    return LlamaForCausalLM(config), rows


def sums(packed: bool, size: int, by_length: bool = False) -> Callable[[], torch.Tensor]:
    """Log-probabilities of all demonstrations, with their gradients, in batches."""
    from fairlead_training.statistics import assemble, attention_of, lay_out, token_stats

    model, rows = skewed()
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["completion_ids"][0])) if by_length else list(range(len(rows)))

    def call() -> torch.Tensor:
        found = torch.zeros(len(rows))
        model.zero_grad()
        for start in range(0, len(rows), size):
            members = order[start : start + size]
            with attention_of(model, packed):
                logp = assemble(token_stats(model, lay_out([rows[i] for i in members], packed)), [rows[i] for i in members]).logp
                logp.sum().backward()
            found[members] = logp.detach()
        return found

    return call


def check_packed() -> None:
    found, right = sums(True, 16)(), sums(False, 8, True)()
    if not float(((found - right) / right).abs().max()) < 1e-5:
        raise AssertionError("packed and padded log-probabilities differ")


def rows() -> Iterator[Row]:
    for vocabulary in (32_000, 151_936):
        for head, at_least, less in (("trained", 1.8, 4.0), ("frozen", 3.0, 20.0)):
            yield Row(
                operation=f"DPO log-prob path, {head} head",
                shape=f"{SEQUENCES} x {LENGTH} x {WIDTH} x {vocabulary}",
                dtype="float32",
                ours=functools.partial(path, our_logps, vocabulary, head == "frozen"),
                peers={"TRL": functools.partial(path, trl_logps, vocabulary, head == "frozen")},
                baseline="TRL",
                at_least=at_least,
                memory=True,
                less_memory=less if vocabulary > 100_000 else 0.0,
                check=check_path,
                peer_repeats=1,
            )
    for vocabulary in (1_200, 32_000):
        yield Row(
            operation="whole DPO step",
            shape=f"4 pairs, 4 x 128, {vocabulary}",
            dtype="float32",
            ours=functools.partial(our_step, vocabulary),
            peers={"TRL": functools.partial(trl_step, vocabulary)},
            baseline="TRL",
            at_least=1.0,
            memory=True,
            less_memory=1.0,
            check=functools.partial(check_step, vocabulary),
            peer_repeats=2,
        )
    yield Row(
        operation="packed training rows",
        shape="64 sequences, median 40",
        dtype="float32",
        ours=functools.partial(sums, True, 16),
        peers={f"sorted by {n}": functools.partial(sums, False, n, True) for n in (8, 16, 64)},
        baseline="sorted by 16",
        at_least=2.0,
        check=check_packed,
    )
    yield Row(
        operation="kept reference",
        shape="4 pairs, 4 x 128, 32000, LoRA",
        dtype="float32",
        ours=functools.partial(our_step, 32_000, True),
        peers={"asked": functools.partial(our_step, 32_000, True, precompute_ref_log_probs=False)},
        baseline="asked",
        at_least=1.4,
        check=check_kept,
    )
