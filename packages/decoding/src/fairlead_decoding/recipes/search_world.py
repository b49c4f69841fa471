"""Two worlds in which a search for required words can be measured.

Random bigram models: token s is followed by the end token with a fixed probability, else by a draw from a Dirichlet row, so
greedy decoding runs in circles and never meets most of the required tokens. Sentences: templates of clauses, some after an
instruction to use the given words, from which a model of two layers learns to write and, less reliably, to obey.
What is searched for and how is the recipe's business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from fairlead.kinds import Reward


class BigramLM(torch.nn.Module):
    """A causal LM whose next token depends on the last one alone; the last token of the vocabulary ends a text.

    vocab: tokens V. end: probability of the end token after every other. concentration: of the Dirichlet rows over the V - 1
    others; the smaller, the fewer successors a token has.
    """

    logp_VV: torch.Tensor

    def __init__(self, vocab: int, end: float, concentration: float, seed: int) -> None:
        super().__init__()
        from transformers import PretrainedConfig

        rng = np.random.default_rng([seed, 1])
        probs = np.zeros((vocab, vocab))
        probs[:-1, :-1] = (1 - end) * rng.dirichlet(np.full(vocab - 1, concentration), vocab - 1)
        probs[:-1, -1] = end
        probs[-1, -1] = 1.0
        with np.errstate(divide="ignore"):
            self.register_buffer("logp_VV", torch.from_numpy(np.log(probs)).float())
        self.config = PretrainedConfig(vocab_size=vocab)
        self.generation_config = SimpleNamespace(eos_token_id=vocab - 1, pad_token_id=vocab - 1)
        self.device = torch.device("cpu")

    def get_output_embeddings(self) -> None:
        """There is no head: a table is looked up."""
        return None

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past_key_values: Any = None, logits_to_keep: int = 0
    ) -> Any:
        """logits float32 [B, T or logits_to_keep, V], and a cache in which nothing need be kept."""
        return SimpleNamespace(logits=self.logp_VV[input_ids[:, -logits_to_keep:]], past_key_values=_NoMemory())


class _NoMemory:
    """The cache of a model that looks at one token: whatever is done to it, it stays empty."""

    def batch_repeat_interleave(self, repeats: int) -> None: ...

    def batch_select_indices(self, indices: torch.Tensor) -> None: ...

    def crop(self, columns: int) -> None: ...


class RequiredTokens(Reward):
    """Share of the required tokens that an answer has; the required ones are all of the prompt's tokens but its last."""

    granularity = "prefix"
    accepts_ids = True
    bounds = (0.0, 1.0)

    def __call__(
        self, prompts: Sequence[Any], responses: Sequence[Any], finished: Sequence[bool] | None = None, **columns: Any
    ) -> torch.Tensor:
        required_NJ = torch.stack([prompt[:-1] for prompt in prompts])
        answers_NT = torch.nn.utils.rnn.pad_sequence(list(responses), batch_first=True, padding_value=-1)
        return (answers_NT[:, :, None] == required_NJ[:, None]).any(1).float().mean(1)


def bigram_prompts(vocab: int, count: int, required: int, seed: int) -> list[torch.Tensor]:
    """Ids int64 [required + 1] of each prompt: the required tokens, all different, and the token to start from."""
    rng = np.random.default_rng([seed, 2])
    return [
        torch.from_numpy(np.append(rng.choice(vocab - 1, required, replace=False), rng.integers(vocab - 1))).long()
        for _ in range(count)
    ]


NOUNS = ("dog", "cat", "boy", "girl", "farmer", "teacher", "bird", "horse", "sailor", "painter")
VERBS = ("runs", "sleeps", "sings", "jumps", "eats", "reads", "waits", "works", "plays", "walks")
PLACES = ("park", "garden", "house", "school", "river", "market", "barn", "beach", "forest", "town")
QUALITIES = ("old", "young", "happy", "tired", "small", "big", "quiet", "hungry", "brave", "clever")
LINKS = ("and", "while", "but")
SLOTS = {"quality": QUALITIES, "noun": NOUNS, "verb": VERBS, "place": PLACES}
INSTRUCTION = "use all of these words"
_OBEYS, _HINTED = 0.8, 0.3  # chance that a given word is used, with the instruction and without
_CLAUSES = (0.25, 0.4, 0.25, 0.1)  # of 1, 2, 3, 4 clauses


class Sentences:
    """Templates of one to four clauses, "the [quality] noun verb [in the place]", with words that go together drawn once."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng([seed, 3])
        self.nouns = rng.dirichlet(np.full(len(NOUNS), 0.6))
        # What each noun does, is and where: few things often.
        self.after = {slot: rng.dirichlet(np.full(len(words), 0.3), len(NOUNS)) for slot, words in SLOTS.items() if slot != "noun"}

    def concepts(self, rng: np.random.Generator, count: int) -> list[str]:
        """Words to use: as many of each part of speech as can be, in random order, all different."""
        parts = list(SLOTS)
        chosen: list[str] = []
        for i in range(count):
            words = [w for w in SLOTS[parts[i % len(parts)]] if w not in chosen]
            chosen.append(str(rng.choice(words)))
        return [chosen[i] for i in rng.permutation(count)]

    def document(self, rng: np.random.Generator, count: int) -> tuple[str, str]:
        """A prompt, half of them with the instruction, and a sentence that follows it more or less."""
        concepts, obeys = self.concepts(rng, count), bool(rng.random() < 0.5)
        use = [w for w in concepts if rng.random() < (_OBEYS if obeys else _HINTED)]
        before = f"{INSTRUCTION}\n\n" if obeys else ""
        return before + sentence_prompt(concepts), self.sentence(rng, use)

    def sentence(self, rng: np.random.Generator, use: Sequence[str] = ()) -> str:
        """A sentence that has the words of `use`, each in a clause of its own choice."""
        waiting = {slot: [w for w in use if w in words] for slot, words in SLOTS.items()}
        least = max(1, *(len(words) for words in waiting.values()))
        clauses = max(least, 1 + int(rng.choice(len(_CLAUSES), p=_CLAUSES)))
        places = {slot: rng.permutation(clauses)[: len(words)] for slot, words in waiting.items()}
        said = []
        for c in range(clauses):
            fixed = {s: w for s, words in waiting.items() for place, w in zip(places[s], words, strict=True) if place == c}
            noun = fixed.get("noun") or str(rng.choice(NOUNS, p=self.nouns))
            row = NOUNS.index(noun)
            word = {s: fixed.get(s) or str(rng.choice(SLOTS[s], p=self.after[s][row])) for s in self.after}
            quality = f"{word['quality']} " if "quality" in fixed or rng.random() < 0.4 else ""
            place = f" in the {word['place']}" if "place" in fixed or rng.random() < 0.4 else ""
            said.append(f"the {quality}{noun} {word['verb']}{place}")
        return "".join(s if i == 0 else f" {rng.choice(LINKS)} {s}" for i, s in enumerate(said)) + " ."


def sentence_prompt(concepts: Sequence[str]) -> str:
    """The input of one prompt: its words, and where the sentence begins."""
    return f"words {' '.join(concepts)} sentence"


def prompt_concepts(prompt: str) -> list[str]:
    """The words that a prompt of `sentence_prompt` gives."""
    return prompt.split("words ")[-1].removesuffix(" sentence").split()


def sentence_tokenizer(world: Sentences, vocab: int, concepts: int, seed: int) -> Any:
    """Byte-level pieces learnt from the world's own documents: frequent words are one token, most are two or three, so that a
    word is not there before its last piece."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = np.random.default_rng([seed, 5])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [part for _ in range(500) for part in world.document(rng, concepts)]
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=["<pad>", "<eos>"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def train_sentence_model(
    tokenizer: Any, world: Sentences, seed: int, *, steps: int, concepts: int, width: int, batch: int = 40,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Any, float]:  # fmt: skip
    """A Llama of two layers trained on `steps` fresh batches, and its loss over the last tenth, nats per token of a sentence."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    rng = np.random.default_rng([seed, 4])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.1)
    losses = []
    for step in range(steps):
        ids_BT, labels_BT = _batch(tokenizer, [world.document(rng, concepts) for _ in range(batch)])
        loss = model(input_ids=ids_BT, attention_mask=(ids_BT != tokenizer.pad_token_id).long(), labels=labels_BT).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if progress is not None and step % 20 == 0:
            progress(step, steps)
    return model.eval(), float(np.mean(losses[-max(1, steps // 10) :]))


def _batch(tokenizer: Any, documents: Sequence[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels int64 [B, T]; only the sentences are learnt."""
    rows, labels = [], []
    for prompt, sentence in documents:
        before, after = tokenizer(prompt)["input_ids"], [*tokenizer(sentence)["input_ids"], tokenizer.eos_token_id]
        rows.append(torch.tensor([*before, *after]))
        labels.append(torch.tensor([-100] * len(before) + after))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, True, tokenizer.pad_token_id), pad(labels, True, -100)
