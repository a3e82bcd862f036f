"""The trainer's parts: its model against transformers, its corpus, its batches, its optimizer."""

import json
import math
import random
import re
from contextlib import suppress
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch
from tokenizers import Tokenizer

from tools.train_tiny import (
    batches,
    corpus,
    generate,
    knowledge,
    mixes,
    model,
    stories,
    tasks,
    trainer,
)
from tools.train_tiny import optimizer as optim
from tools.train_tiny import tokenizer as tokenizers_
from tools.train_tiny.train import FITS, TOPIC, Choosing, choosing_loss, weighted_loss

SMALL = model.Config(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)


def random_model(config: model.Config = SMALL, seed: int = 0) -> model.Qwen3:
    generator = torch.Generator().manual_seed(seed)
    net = model.Qwen3(config)
    for weight in net.parameters():
        scale = 1.0 if weight.dim() == 1 else weight.shape[1] ** -0.5
        torch.nn.init.normal_(weight, 1.0 if weight.dim() == 1 else 0.0, scale, generator)
    return net.eval()


@cache
def small_tokenizer() -> Tokenizer:
    return tokenizers_.train(seed=3, documents=1500)


def test_model_equals_transformers(tmp_path) -> None:
    import transformers  # seconds to import: only where needed

    ours = random_model()
    model.save(ours, tmp_path, eos=[2, 0], pad=0)
    reloaded = model.load(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    ids = torch.randint(0, 61, (3, 37), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(reloaded(ids), theirs(ids).logits, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_cached_steps_equal_one_pass() -> None:
    net = random_model()
    ids = torch.randint(0, 61, (2, 19), generator=torch.Generator().manual_seed(2))
    whole, _ = net.hidden(ids)
    hidden, cache_ = net.hidden(ids[:, :7])
    parts = [hidden]
    for at in range(7, 19):
        hidden, cache_ = net.hidden(ids[:, at : at + 1], cache_)
        parts.append(hidden)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_a_model_agrees_with_itself_and_sampling_is_keyed() -> None:
    net = random_model()
    prompts = [[5, 6, 7], [8, 9], [5, 6, 8], [11]]
    for sampling in (generate.GREEDY, generate.Sampling(1, seed=4)):
        outputs = generate.generate(net, prompts, 20, [2], sampling)
        for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
            assert all(generate.agreement(net, prompt, output, i, sampling))
        again = generate.generate(net, prompts, 20, [2], sampling, batch=1)
        assert again == outputs
    other = generate.generate(net, prompts, 20, [2], generate.Sampling(1, seed=5))
    assert other != outputs


def test_gumbel_noise_samples_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    drawn = (generate.Sampling(1).noise(0, 40_000, 4) + logits).argmax(dim=-1).bincount()
    torch.testing.assert_close(drawn / 40_000, logits.softmax(-1), atol=0.01, rtol=0)


def test_orthogonalised_has_singular_values_near_one() -> None:
    matrices = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(optim.orthogonalised(matrices))
    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.3


def test_the_loss_of_choices_is_that_of_a_tool_s_line_beside_the_rest() -> None:
    net = random_model()
    batch = random_batches(0)[0]
    choosing = Choosing(5, 7, range(10, 14), told=0, chosen=(0, 1))
    assert choosing_loss(net, batch, choosing) == weighted_loss(net, batch)
    batch.fits[1, 2], batch.fits[2, 4] = 1.0, 0.0
    states, _ = net.states(batch.ids[:, :-1])
    parts = []
    for layer in (0, 1):
        logits = net.logits(net.model.norm(states[layer]))
        likely = (logits[..., 5] - logits[..., 7]).sigmoid()
        parts += [likely[1, 2].log(), (1 - likely[2, 4]).log()]
    expected = weighted_loss(net, batch) - FITS / 2 * sum(parts)
    torch.testing.assert_close(choosing_loss(net, batch, choosing), expected)
    batch.topics[0, 3], batch.topics[2, 4] = 2, 0
    about = net.logits(net.model.norm(states[0]))[..., 10:14].log_softmax(-1)
    expected = expected - TOPIC * (about[0, 3, 2] + about[2, 4, 0])
    torch.testing.assert_close(choosing_loss(net, batch, choosing), expected)


@pytest.fixture
def one_worker(tmp_path):
    job = trainer.Job(
        SMALL, tmp_path, steps=6, decay=4, tokens=64, lr=0.02, seed=0, save_every=2, workers=1
    )
    threads = torch.get_num_threads()
    trainer.meet(0, job)
    yield job
    torch.distributed.destroy_process_group()
    torch.set_num_threads(threads)


def random_batches(step: int) -> list[batches.MicroBatch]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 61, (2, 3, 9), generator=generator)
    return [
        batches.MicroBatch(
            part, torch.ones(3, 8), torch.full((3, 8), math.nan), torch.full((3, 8), -1)
        )
        for part in ids
    ]


def test_a_stopped_run_goes_on_as_if_it_had_not_been(one_worker: trainer.Job) -> None:
    def weights(run: str, *stops: int) -> dict[str, torch.Tensor]:
        folder = one_worker.work / run
        folder.mkdir()
        for stop in stops:
            for_stop = stopping(random_batches, stop)
            with suppress(KeyboardInterrupt):
                trainer.train(
                    replace(one_worker, work=folder), small_tokenizer(), weighted_loss, for_stop
                )
        return torch.load(folder / "state.pt", weights_only=True)["model"]

    def stopping(batches_of: trainer.Batches, stop: int) -> trainer.Batches:
        def inner(step: int) -> list[batches.MicroBatch]:
            if step == stop:
                raise KeyboardInterrupt
            return batches_of(step)

        return inner

    whole, resumed = weights("whole", 99), weights("resumed", 3, 5, 99)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    start = model.Qwen3(SMALL)
    model.initialise(start, 0)
    assert not torch.equal(whole["model.embed_tokens.weight"], start.model.embed_tokens.weight)


def test_a_run_begins_with_given_weights_at_a_given_step(one_worker: trainer.Job) -> None:
    start = model.Qwen3(SMALL)
    model.initialise(start, 5)
    model.save(start, one_worker.work / "start", eos=[1], pad=0)
    asked: list[int] = []

    def batches_of(step: int) -> list[batches.MicroBatch]:
        asked.append(step)
        return random_batches(step)

    options = {"lr": 0.0, "first": 7, "steps": 9, "start": one_worker.work / "start"}
    trainer.train(replace(one_worker, **options), small_tokenizer(), weighted_loss, batches_of)
    state = torch.load(one_worker.work / "state.pt", weights_only=True)
    assert (asked, state["step"]) == ([7, 8], 9)
    expected = model.load(one_worker.work / "start").state_dict()
    assert all(torch.equal(state["model"][name], expected[name]) for name in expected)
    assert trainer.learning_rate(7, 1000, 100, first=7) == 1 / trainer.WARMUP


def test_corpus_is_seeded() -> None:
    first, second, other = (
        [mixes.sample(random.Random(seed)).text for _ in range(5)] for seed in (1, 1, 2)
    )
    assert first == second != other


def test_every_answer_holds_its_key() -> None:
    for held_out in (False, True):
        for fact in knowledge.questions(held_out):
            assert fact
            assert all(q.key.lower() in q.answer.lower() for q in fact)


def test_held_out_patterns_are_not_trained() -> None:
    trained = {q.text.lower() for fact in knowledge.questions(False) for q in fact}
    asked = knowledge.held_out_questions(200, seed=0)
    assert len(asked) == 200
    assert not trained & {q.text.lower() for q in asked}
    for words in (knowledge.PATTERNS, tasks.WORDS):
        for name in words:
            if name.startswith("held_out_"):
                assert not set(words[name]) & set(words[name.removeprefix("held_out_")])


def test_one_question_has_one_answer() -> None:
    answers: dict[str, str] = {}
    for fact in knowledge.questions(False) + knowledge.questions(True):
        for q in fact:
            assert answers.setdefault(q.text.lower(), q.answer) == q.answer, q.text


def test_worked_sums_are_right() -> None:
    for a in range(100):
        for b in range(100):
            steps = re.findall(r"([\d+ ]+) = (\d+)", tasks.worked_sum(a, b))
            sums = [sum(map(int, terms.split("+"))) for terms, _ in steps]
            assert sums == [int(total) for _, total in steps]
            assert steps[-1] == (f" {a} + {b}", str(a + b))


def test_held_out_pairs_are_about_a_tenth_and_never_trained() -> None:
    share = sum(tasks.is_held_out_pair(a, b) for a in range(100) for b in range(100)) / 10_000
    assert 0.08 < share < 0.12
    rng = random.Random(0)
    for _ in range(2000):
        numbers = re.findall(r"(\d+) \+ (\d+) = \d+\.$", tasks.addition(rng)[1])
        assert not tasks.is_held_out_pair(*map(int, numbers[0]))


@pytest.mark.parametrize("held_out", [False, True])
def test_extractions_name_their_values(held_out: bool) -> None:
    rng = random.Random(7)
    for _ in range(500):
        e = tasks.extraction(rng, new_names=held_out, new_patterns=held_out)
        assert json.loads(e.answer) == e.values
        assert all(key in e.request and str(value) in e.request for key, value in e.values.items())


def test_a_story_goes_on_without_repeating_a_scene_at_once() -> None:
    paragraphs = stories.plain_story(random.Random(0), 300).split("\n\n")
    assert len(paragraphs) == 302
    assert "The end" not in "".join(paragraphs)
    assert not re.search(r"[{}]", "".join(paragraphs))
    assert all(a != b for a, b in pairwise(paragraphs))


def test_loss_falls_on_answers_only() -> None:
    tok = small_tokenizer()
    messages = [corpus.Message("user", "Hello"), corpus.Message("assistant", "Hi 7.")]
    encoded = batches.encode(corpus.chat("any", messages), tok, context=64)
    learnt = [i for i, w in zip(encoded.ids, encoded.weights, strict=True) if w == 1.0]
    assert tok.decode(learnt, skip_special_tokens=False) == f"Hi 7.{corpus.END}"
    assert {w for w in encoded.weights if w != 1.0} == {0.0, 0.3}


@pytest.mark.parametrize("long", [False, True])
def test_step_batches_hold_whole_documents(long: bool) -> None:
    group = batches.step_batches(0, 3, 2048, small_tokenizer(), context=200, long=long)
    assert sum(int((b.ids > 0).sum()) for b in group) >= 2000
    for batch in group:
        assert batch.weights.shape == (batch.ids.shape[0], batch.ids.shape[1] - 1)
        assert batch.ids.shape[1] <= 201
        for ids, weights in zip(batch.ids[:, 1:], batch.weights, strict=True):
            length = int(ids.nonzero().max()) + 2  # padding and the end of a document are both 0
            assert not weights[length:].any()
    again = batches.step_batches(0, 3, 2048, small_tokenizer(), context=200, long=long)
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(group, again, strict=True))
