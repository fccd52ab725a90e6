"What a user may hand to selectors and the harness, and the notebooks do not: falling budgets, NaN, masks, other people's files."
from dataclasses import replace

import pytest
import torch

from arr_course.arr import Opponents, arr_2
from arr_course.bench import taken
from arr_course.connectors import keep, keep_all, windows
from arr_course.harness import asked_models, check_jobs, read_lines, write_line
from arr_course.packed import greedy_choice
from arr_course.peers import PEERS, calibrated
from arr_course.reducers import REDUCERS, sides
from arr_course.relevance import Context, Query
from arr_course.vit import Features


@pytest.fixture
def context():
    "Four pictures of 6 x 6 patches; the last question names nothing."
    torch.manual_seed(0)
    f = Features(torch.randn(4, 36, 16), (6, 6), saliency=torch.rand(4, 36))
    unit = lambda *s: torch.nn.functional.normalize(torch.randn(*s), dim=-1)
    mask = torch.tensor([[True], [True], [True], [False]])
    q = Query(("a cat?", "a dog?", "a cow?", "what?"), (("cat",), ("dog",), ("cow",), ()), unit(4, 1, 8), mask)
    return Context(f, unit(4, 36, 8), q)


def test_thresholds_do_not_depend_on_the_order_of_budgets(context):
    a, b = (calibrated(PEERS["occamtoken"], [context], o) for o in ((20, 12, 6), (6, 12, 20)))
    for k in (6, 12, 20): assert a(context, k).lengths.tolist() == b(context, k).lengths.tolist()
    assert a(context, 20).lengths.sum() > a(context, 6).lengths.sum()
    with pytest.raises(ValueError, match="thresholds are there for 6 to 20"): a(context, 30)
    with pytest.raises(ValueError, match="no threshold to set"): calibrated(arr_2(), [context], (6,))


@pytest.mark.parametrize("reducer", [arr_2(), REDUCERS["divprune"], REDUCERS["uniform"]], ids=lambda r: r.name)
def test_less_than_one_token_and_nan_are_refused(context, reducer):
    for k in (0, .4, -3):
        with pytest.raises(ValueError, match="less than one"): reducer(context, k)
    broken = context.patches.clone(); broken[1, 3, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN"): reducer(replace(context, features=replace(context.features, patches=broken)), 4)


def test_a_budget_above_the_largest_of_arr_2_is_the_same_for_each_question(context):
    some = replace(arr_2({20: 0.}), high=20)
    assert some(context, 30).lengths.tolist() == [30] * 4


def test_a_choice_has_no_gradient_and_what_is_kept_has_one(context):
    x = context.patches.clone().requires_grad_(True)
    s = arr_2()(replace(context, features=replace(context.features, patches=x)), 5)
    s.tokens.sum().backward()
    assert x.grad.abs().sum(-1).gt(0).sum() == 20


MASK = torch.tensor([False, True, False, True])


@pytest.mark.parametrize("index", [MASK, torch.tensor([1, 3]), [1, 3], slice(1, 4, 2)], ids=str)
def test_rows_of_a_context(context, index):
    c = context.rows(index)
    assert (len(c), c.query.text) == (2, ("a dog?", "what?")) and c.patches.equal(context.patches[[1, 3]])


def test_one_row_of_a_context_is_a_context(context):
    assert context.rows(2).query.text == ("a cow?",) and context.rows(2).patches.shape == (1, 36, 16)


@pytest.mark.parametrize("name", ["trim", "cdpruner", "eadp", "sieve", "occamtoken"])
def test_a_peer_that_reads_the_question_says_that_there_is_none(context, name):
    with pytest.raises(ValueError, match="question"): PEERS[name](Context(context.features, context.joint), 5)


def test_greedy_choice_takes_no_patch_twice():
    sim = torch.rand(2, 5, 5)
    assert greedy_choice(sim, torch.ones(2, 5), 9)[0].sort(1).values.tolist() == [[0, 1, 2, 3, 4]] * 2


def test_a_long_grid_can_be_made_one_token(): assert [sides(1, g) for g in ((12, 20), (1, 9))] == [(1, 1)] * 2


def test_masks_of_patches(context):
    mask = torch.zeros(4, 36, dtype=torch.bool); mask[:, [2, 30]] = True
    assert keep(context.features, mask).index.tolist() == keep(context.features, list(mask)).index.tolist() == [2, 30] * 4
    assert windows(windows(keep_all(context.features), (2, 2)), (3, 3)).pos.tolist() == [[2.5, 2.5]] * 4


def test_results_are_read_from_their_own_files_only(tmp_path):
    path = tmp_path / "r.jsonl"
    write_line(path, dict(a=1)); write_line(tmp_path / "r.1.jsonl", dict(a=2)); write_line(tmp_path / "r.other.jsonl", dict(a=3))
    assert sorted(o["a"] for o in read_lines(path)) == [1, 2]
    with pytest.raises(ValueError, match="kept in a .jsonl file"): read_lines(tmp_path / "r")
    path.write_text('{"a": 1}\n{"a": \n{"a": 5}\n')
    with pytest.raises(ValueError, match="r.jsonl, line 2 is damaged"): read_lines(path)


def test_variants_and_budgets_are_looked_at_before_the_work():
    check_jobs(["full", "arr-2", "arr-2:fixed", "arr-2:shuffled"], [64], 576)
    with pytest.raises(ValueError, match="arr-2:foo"): check_jobs(["arr-2:foo"], [64], 576)
    with pytest.raises(ValueError, match="a picture has 576"): check_jobs(["arr-2"], [64, 600], 576)


def test_pictures_keep_their_questions_and_windows_their_places():
    "Masks of yes and no are rows, not the numbers 0 and 1; some pictures of windows stand where they stood."
    words = Query(("a", "b", "c"), (("a",), ("b",), ("c",)), torch.randn(3, 1, 4), torch.ones(3, 1, dtype=torch.bool))
    c = Context(Features(torch.randn(3, 25, 4), (5, 5)), query=words)
    for index in ([True, False, True], torch.tensor([1, 0, 1]).bool(), [0, 2], slice(0, 3, 2)):
        assert c.rows(index).query.text == ("a", "c")
    assert c.rows(1).query.text == ("b",) and len(c.rows([])) == 0
    s = windows(keep_all(c.features), (3, 3), (2, 2))
    one = taken(s, [1])
    assert one.centre(torch.zeros(2)).tolist() == [1, 1] and one.pos.equal(s.pos[:4])


def test_what_cannot_be_is_said():
    with pytest.raises(ValueError, match="made with 0.3"): replace(arr_2(), opponents=Opponents(explore=1.))
    blank = Query(("a",), ((),), torch.zeros(1, 1, 4), torch.zeros(1, 1, dtype=torch.bool))
    bare = Context(Features(torch.randn(1, 16, 4), (4, 4)), joint=torch.randn(1, 16, 4), query=blank)
    with pytest.raises(ValueError, match="give no level"): calibrated(PEERS["trim-iqr"], [bare], (8,))
    with pytest.raises(ValueError, match="at least one model"): asked_models(" , ")
