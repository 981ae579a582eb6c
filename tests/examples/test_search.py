"""The example on search: its measures, and that nothing which is judged with a held-out query is trained on."""

from __future__ import annotations

import importlib.util
import itertools
import random

import pytest
import search
import torch
from search import Items

TOPICS = ["flood rain river", "bank profit share", "whale shark beach", "vote party leader", "goal match cup",
          "film actor prize"]  # fmt: skip


def fixture() -> Items:
    """24 items about six topics, each like its own topic's."""
    choice = random.Random(0)
    words = [TOPICS[i % 6].split() for i in range(24)]
    texts = [" ".join(choice.choices(own, k=8)) + f" on day {i}" for i, own in enumerate(words)]
    similarity = torch.eye(24)
    for i, j in itertools.combinations(range(24), 2):
        similarity[i, j] = similarity[j, i] = (0.7 if i % 6 == j % 6 else 0.2) + 0.1 * choice.random()
    return Items(texts, [f"on day {i}" for i in range(10)], similarity)


def test_a_story_is_a_chain_of_alike_items():
    similarity = torch.eye(6)
    for i, j in ((0, 4), (4, 2), (1, 3)):
        similarity[i, j] = similarity[j, i] = search.SAME_STORY
    assert search.stories(similarity) == [0, 1, 0, 1, 0, 5]


@pytest.mark.parametrize("seed", range(3))
def test_folds_have_every_item_once_and_no_story_twice(seed):
    story = [i % 7 for i in range(30)]
    found = search.folds(story, 4, seed)
    assert sorted(itertools.chain(*found)) == list(range(30)) and len(found) == 4
    assert not any({story[i] for i in a} & {story[i] for i in b} for a, b in itertools.combinations(found, 2))


def test_an_item_is_no_candidate_for_itself_and_the_most_alike_comes_first():
    grades = torch.tensor([[4.0, 1.0, 2.0], [1.0, 4.0, 3.0], [2.0, 3.0, 4.0]])
    scores = torch.arange(9.0).view(3, 3)
    rows, targets = search.lists(scores, grades)
    assert targets.tolist() == [[2.0, 1.0], [3.0, 1.0], [3.0, 2.0]]
    assert rows.tolist() == [[2.0, 1.0], [5.0, 3.0], [7.0, 6.0]]
    assert search.first_is_best(scores, grades) == [1.0, 1.0, 1.0]
    assert search.first_is_best(-scores, grades) == [0.0, 0.0, 0.0]
    assert search.first_is_best(torch.zeros(3, 3), grades) == [0.0, 0.0, 0.0]


def test_an_untrained_head_scores_by_the_centred_cosine():
    states, centre = torch.randn(5, 8), torch.randn(8)
    head = search.Head(centre)
    expected = torch.nn.functional.cosine_similarity(*(states[:, None] - centre, states[None] - centre), dim=-1)
    torch.testing.assert_close(head(states) / head.log_scale.exp(), expected)


@pytest.mark.parametrize("loss_type", search.LOSSES)
def test_a_head_learns_which_dimension_says_what_is_alike(loss_type):
    """Items are alike by their first four dimensions of 64; the others are noise."""
    torch.manual_seed(0)
    states = torch.randn(40, 64)
    own = torch.nn.functional.normalize(states[:, :4], dim=1)
    grades = 2 + 2 * own @ own.T
    train, test = grades[:30, :30], grades[30:, 30:]
    before, after = search.Head(states[:30].mean(0)), search.fit(states[:30], train, loss_type, 60)
    ends = [sum(search.queries_ndcg(head(states[30:]).detach(), test, range(10))) / 10 for head in (before, after)]
    assert ends[1] > ends[0] + 0.05
    assert after.log_weight[:4].mean() > after.log_weight[4:].mean() + 0.2


def test_judgements_with_a_held_out_query_change_nothing_that_scores_it(monkeypatch):
    """Each column and row of a fold's items is replaced, and the fold's scores stay."""
    items, states = fixture(), torch.randn(24, 16)
    monkeypatch.setattr(search, "STEPS", 10)
    story = search.stories(items.similarity)
    scores, _ = search.held_out_scores(states, items, seed=0)
    for out in search.folds(story, search.FOLDS, 0)[:2]:
        changed = items.similarity.clone()
        changed[out, :] = changed[:, out] = 0.9
        monkeypatch.setattr(search, "stories", lambda similarity: story)  # the same split
        again, _ = search.held_out_scores(states, items._replace(similarity=changed), seed=0)
        for name in scores:
            assert torch.equal(scores[name][out], again[name][out])
            others = [i for i in range(24) if i not in out]
            assert name == "untrained" or not torch.equal(scores[name][others], again[name][others])


def test_words_that_are_common_in_the_background_say_nothing():
    found = search.tf_idf(["day rain", "day bank", "rain rain"], ["day"] * 3)
    assert found[0, 1] == 0 and found[0, 2] == pytest.approx(1) and found.diag().tolist() == pytest.approx([1] * 3)


def test_missing_data_is_asked_for_by_its_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install gensim"):
        search.lee()


@pytest.mark.skipif(importlib.util.find_spec("gensim") is None, reason="gensim is not installed")
def test_the_installed_data_is_50_items_with_a_judgement_of_every_two():
    items = search.lee()
    assert len(items.texts) == len(items.similarity) == 50 and len(items.background) == 300
    assert torch.equal(items.similarity, items.similarity.T) and (items.similarity.diag() == 1).all()
    assert 0.2 <= items.similarity.min() and items.similarity.max() <= 1


def test_search_runs_and_each_item_is_a_query_once(monkeypatch, tmp_path):
    monkeypatch.setattr(search, "lee", fixture)
    monkeypatch.setattr(search, "PACKAGES", ())
    monkeypatch.setattr(search, "STEPS", 10)
    report = search.main(["--tiny", "--work", str(tmp_path / "work"), "--results", str(tmp_path)])
    figures = {figure.name: figure for figure in report.figures}
    assert all(len(figure.after) == 24 and len(set(figure.groups)) == 6 for figure in report.figures)
    words = figures["TF-IDF"]
    assert sum(words.after) / 24 > words.baseline + 0.2
    assert figures["head by softmax-DPO"].before == figures["hidden states, centred"].after
    text = (tmp_path / "search.md").read_text()
    assert "| head by LiPO-lambda |" in text and "softmax-DPO " in text
