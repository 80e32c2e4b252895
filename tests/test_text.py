"""Character models: texts, streams, networks beside slow references, training, resumption, the command line."""

import dataclasses
import json
import math
import random

import pytest
import torch
from torch.nn import functional as F

from normprop.errors import NormPropError
from normprop.lab.commands import main
from normprop.lab.samples.datasets import load
from normprop.lab.text.character_model import RECURRENT_NORMS, CharacterLSTM, continued, recurrent_norm
from normprop.lab.text.corpus import divided, read
from normprop.lab.text.layer_norm_lstm import LayerNormLSTM
from normprop.lab.text.plain_lstm import PlainLSTM
from normprop.lab.text.streams import Streams, rows
from normprop.lab.text.text_recipe import TextRecipe
from normprop.lab.text.text_training import CHECKPOINT, METRICS, SAMPLE, bits_per_character, train_text
from normprop.lab.training import checkpoint

every_norm = pytest.mark.parametrize("norm", RECURRENT_NORMS)
TINY = TextRecipe(hidden=24, updates=12, batch_size=4, window=10, seed=1)


def sentences(count):
    """A language of a few words, whose next word depends on the last one."""
    chance = random.Random(0)
    after = {"the": ["cat", "dog"], "cat": ["sat.", "saw"], "dog": ["ran.", "saw"], "saw": ["the"]}
    words = ["the"]
    while len(words) < count:
        words.append(chance.choice(after.get(words[-1], ["the"])))
    return " ".join(words)


@pytest.fixture(scope="module")
def corpus():
    return divided("sentences", sentences(1500))


def test_the_parts_of_a_text_are_the_text():
    text = sentences(100)
    corpus = divided("sentences", text, held_out=0.1)
    parts = (corpus.train, corpus.validation, corpus.test)
    assert "".join(map(corpus.decoded, parts)) == text
    assert len(corpus.test) == len(corpus.validation) == len(text) // 10
    assert corpus.decoded(corpus.encoded("the cat")) == "the cat"
    with pytest.raises(NormPropError, match="'z'"):
        corpus.encoded("the z")


@pytest.mark.parametrize("step", range(12))
def test_streams_read_each_character_once_a_pass_and_its_successor(step):
    text = torch.arange(103)
    streams = Streams(text, count=4, window=3)
    x, y = streams.window(step)
    assert torch.equal(y, x + 1)
    assert x.shape == (3, 4)
    if not streams.begins(step):
        assert torch.equal(x[0], streams.window(step - 1)[0][-1] + 1)
    assert (x[0] // 25).tolist() == [0, 1, 2, 3]


def test_windows_of_evaluation_have_all_of_a_text():
    found = rows(torch.arange(43), 2, 4)
    for stream in range(2):
        x, y = (torch.cat([part[:, stream] for part in pair]) for pair in zip(*found, strict=True))
        assert x.tolist() == list(range(21 * stream, 21 * stream + 20))
        assert torch.equal(y, x + 1)


def test_the_loop_with_layer_norm_is_its_steps():
    torch.manual_seed(0)
    layer = LayerNormLSTM(3, 5).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)
    hx = tuple(torch.randn(1, 2, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    found = []
    for run in (layer.forward, layer.unrolled):
        output, (h, c) = run(x, hx)
        torch.manual_seed(1)
        loss = sum((torch.randn_like(t) * t).sum() for t in (output, h, c))
        found.append([output, h, c, *torch.autograd.grad(loss, [x, *hx, *layer.parameters()])])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("grad", [True, False])
def test_the_plain_loop_is_torchs(grad):
    torch.manual_seed(0)
    ours, theirs = PlainLSTM(3, 5, forget_bias=1.0).double(), torch.nn.LSTM(3, 5).double()
    with torch.no_grad():
        for name, value in (("weight_ih", ours.weight_ih), ("weight_hh", ours.weight_hh), ("bias_ih", ours.bias)):
            getattr(theirs, f"{name}_l0").copy_(value)
        theirs.bias_hh_l0.zero_()
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    hx = tuple(torch.randn(1, 2, 5, dtype=torch.float64) for _ in range(2))
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(ours(x, hx), theirs(x, hx))
        torch.testing.assert_close(ours(x), theirs(x))


@every_norm
def test_a_model_reads_a_text_in_parts_as_whole(norm):
    torch.manual_seed(0)
    model = CharacterLSTM(7, recurrent_norm(norm), hidden=8, layers=2, gain=1.0).double()
    x = torch.randint(7, (9, 3))
    whole, _ = model(x)
    first, states = model(x[:4])
    second, _ = model(x[4:], states)
    torch.testing.assert_close(torch.cat([first, second]), whole)
    torch.testing.assert_close(model(x[:, 1:2])[0], whole[:, 1:2])


def test_bits_of_a_model_that_knows_nothing(corpus):
    model = CharacterLSTM(len(corpus.symbols), recurrent_norm("none"), hidden=4)
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    assert bits_per_character(model, corpus.test) == pytest.approx(math.log2(len(corpus.symbols)), rel=1e-5)


def test_bits_are_those_of_single_characters(corpus):
    torch.manual_seed(0)
    model = CharacterLSTM(len(corpus.symbols), recurrent_norm("normprop"), hidden=8)
    text = corpus.test[:33]  # a stream of 33 characters has 32 with a successor
    scores = model(text[:-1, None])[0].squeeze(1)
    expected = F.nll_loss(F.log_softmax(scores, -1), text[1:]).item() / math.log(2)
    short = rows(text, 1, 200)
    assert len(short) == 1
    found = F.cross_entropy(model(short[0][0])[0].flatten(0, 1), short[0][1].flatten()).item() / math.log(2)
    assert found == pytest.approx(expected)


def test_drawing_repeats_itself(corpus):
    model = CharacterLSTM(len(corpus.symbols), recurrent_norm("none"), hidden=8)
    a, b, c = (continued(model, corpus.test[:5], 30, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(continued(model, corpus.test[:5], 0), corpus.test[:0])


@every_norm
def test_training_learns(norm, corpus):
    run = train_text(
        TextRecipe(norm=norm, hidden=48, updates=150, batch_size=8, window=24, lr=0.01), corpus=corpus, sample=40
    )
    first, last = run.rows[0], run.rows[-1]
    assert last.update == 150
    assert last.train_bits < 0.75 * first.train_bits
    assert run.test_bits < 1.2  # words that follow each other at random cost 0.2; without a memory it is 2.7
    assert len(run.sample) == 40


class Killed(BaseException):
    """Stands for a signal."""


def test_a_killed_run_resumes_to_the_same_weights(corpus, tmp_path):
    whole = train_text(TINY, corpus=corpus)

    def kill(row):
        if row.update == 8:
            raise Killed

    with pytest.raises(Killed):
        train_text(TINY, corpus=corpus, out=tmp_path, checkpoint_every=3, report=kill)
    torch.rand(7)
    resumed = train_text(TINY, corpus=corpus, out=tmp_path, resume=True, checkpoint_every=5)
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key
    timeless = [
        [dataclasses.replace(row, seconds=0, characters_per_second=0) for row in run.rows] for run in (whole, resumed)
    ]
    assert timeless[0] == timeless[1]
    assert len((tmp_path / METRICS).read_text().splitlines()) == len(whole.rows)
    assert resumed.sample == whole.sample == (tmp_path / SAMPLE).read_text()


def test_the_state_is_kept_between_windows(corpus):
    """Without it the loss of a step would be that of a window alone."""
    losses = train_text(dataclasses.replace(TINY, updates=2, lr=1e-12), corpus=corpus).rows
    torch.manual_seed(TINY.seed)
    model = CharacterLSTM(len(corpus.symbols), recurrent_norm("normprop"), hidden=24, gain=1.0)
    streams = Streams(corpus.train, count=4, window=10)
    (x0, _), (x1, y1) = streams.window(0), streams.window(1)
    scores = model(torch.cat([x0, x1]))[0][10:]
    expected = F.cross_entropy(scores.flatten(0, 1), y1.flatten()).item() / math.log(2)
    assert losses[1].train_bits == pytest.approx(expected, rel=1e-5)


def test_divergence_is_recorded_and_stops(corpus, tmp_path):
    run = train_text(dataclasses.replace(TINY, norm="none", lr=2e37, clip=0.0), corpus=corpus, out=tmp_path)
    assert run.diverged
    assert run.test_bits is None
    assert json.loads((tmp_path / METRICS).read_text().splitlines()[-1])["diverged"]


def test_refusals(corpus, tmp_path):
    train_text(TINY, corpus=corpus, out=tmp_path)
    with pytest.raises(NormPropError, match="already holds a run"):
        train_text(TINY, corpus=corpus, out=tmp_path)
    with pytest.raises(NormPropError, match=r"--norm normprop → layer"):
        train_text(dataclasses.replace(TINY, norm="layer"), corpus=corpus, out=tmp_path, resume=True)
    with pytest.raises(NormPropError, match="another text"):
        train_text(TINY, corpus=divided("other", "abcd" * 300), out=tmp_path, resume=True)
    state = {key: value for key, value in checkpoint.load(tmp_path / CHECKPOINT).items() if key != "symbols"}
    checkpoint.save(tmp_path / CHECKPOINT, state)
    with pytest.raises(NormPropError, match="images"):
        train_text(TINY, corpus=corpus, out=tmp_path, resume=True)
    with pytest.raises(NormPropError, match="no folder"):
        train_text(TINY, corpus=corpus, resume=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm": "batch"}, "normaliser of an LSTM"),
        ({"model": "charltsm"}, "Did you mean charlstm"),
        ({"hidden": 0}, "--hidden"),
        ({"window": 10_000}, "--window"),
        ({"lr": 0.0}, "--lr"),
        ({"clip": -1.0}, "--clip"),
        ({"clip": math.nan}, "--clip"),
        ({"forget_bias": math.inf}, "--forget-bias"),
        ({"norm": "weight", "gain": 2.0}, "no gains"),
    ],
)
def test_recipes_that_cannot_be_followed(changes, words, corpus):
    with pytest.raises(NormPropError, match=words):
        train_text(dataclasses.replace(TINY, **changes), corpus=corpus)


def test_texts_that_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.setenv("NORMPROP_DATA", str(tmp_path))
    with pytest.raises(NormPropError, match=r"FILE\.txt"):
        read("shakespeare")
    (tmp_path / "shakespeare.txt").write_text(sentences(200))
    assert read("shakespeare").symbols.startswith(" .")
    with pytest.raises(NormPropError, match="Did you mean shakespeare"):
        read("shakespear")
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9" * 50)
    with pytest.raises(NormPropError, match="UTF-8"):
        read(str(tmp_path / "latin.txt"))
    with pytest.raises(NormPropError, match="too few"):
        divided("short", "abc")
    with pytest.raises(NormPropError, match="--held-out"):
        divided("half", "abc" * 100, held_out=0.5)
    with pytest.raises(NormPropError, match="--model charlstm"):
        load("shakespeare")


def test_a_run_needs_no_sample(corpus, tmp_path):
    assert train_text(TINY, corpus=corpus, out=tmp_path, sample=0).sample == ""
    assert (tmp_path / "sample.txt").read_text() == ""


@every_norm
def test_the_command(norm, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.txt").write_text(sentences(300))
    arguments = ["train", "--data", "words.txt", "--model", "charlstm", "--norm", norm, "--hidden", "8"]
    arguments += ["--updates", "4", "--batch-size", "4", "--window", "10", "--sample", "12"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    folder = tmp_path / "runs" / f"words-charlstm-{norm}-h8-s0"
    assert {file.name for file in folder.iterdir()} == {"checkpoint.pt", "metrics.jsonl", "recipe.json", "sample.txt"}
    assert "bits per character" in printed
    assert (folder / "sample.txt").read_text() in printed
    assert main([*arguments, "--resume"]) == 0
    assert main(arguments) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_the_command_explains_itself_and_diverges(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.txt").write_text(sentences(300))
    with pytest.raises(SystemExit) as end:
        main(["train", "--model=charlstm", "--help"])
    assert end.value.code == 0
    assert "--window" in capsys.readouterr().out
    few = ["--hidden", "4", "--updates", "3", "--batch-size", "2", "--window", "5"]
    wild = ["--norm", "none", "--lr", "2e37", "--clip", "0"]
    assert main(["train", "--data", "words.txt", "--model", "charlstm", *few, *wild]) == 1
    assert "diverged" in capsys.readouterr().err


def test_the_list_of_data_has_texts(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NORMPROP_DATA", str(tmp_path))
    assert main(["data"]) == 0
    assert f"shakespeare, not here; put it into {tmp_path / 'shakespeare.txt'}" in capsys.readouterr().out
    (tmp_path / "shakespeare.txt").write_text("To be" * 300_000)
    assert main(["data"]) == 0
    assert "shakespeare.txt (2 MB)" in capsys.readouterr().out
