"""Prompt templates: the prompts of each, how often they are drawn, and their limits."""

from collections import Counter

import pytest

from sampler.core.errors import SamplerError
from sampler.runs.planner import Planner
from sampler.runs.readers import RawLine
from sampler.runs.wildcards import Wildcards
from tests.runs.stub import MODEL, defaults


@pytest.fixture
def words(tmp_path):
    files = {
        "animal": "# beasts\nfox\ndog\n{red|blue} cat\n",
        "few": "3::a\nb\n0::never\n",
        "loop": "x __loop__\n",
        "around": "__dir/*__\n",
        "dir/one": "1\n2\n",
        "dir/sub/two": "3\n",
        "dir/back": "__around__\n",
        "deep/one": "1\n2\n",
        "deep/sub/two": "3\n",
        "--w": "a --w 64\n",
    }
    for name, text in files.items():
        (tmp_path / f"{name}.txt").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.txt").write_text(text)
    return Wildcards(tmp_path)


PROMPTS = [
    ("{a|b} {1|2}", ["a 1", "a 2", "b 1", "b 2"]),
    ("a{|b}", ["a", "ab"]),
    ("a __animal__", ["a fox", "a dog", "a red cat", "a blue cat"]),
    ("{0.7::a|2::b|0::c}", ["a", "b"]),
    ("std::x, (a:1.2), [a:b:0.5]", ["std::x, (a:1.2), [a:b:0.5]"]),
    ("__few__", ["a", "b"]),
    ("__deep/*__", ["1", "2", "3"]),
    ("__d*p/one__", ["1", "2"]),
    ("{2$$a|b|c}", ["a,b", "b,a", "a,c", "c,a", "b,c", "c,b"]),
    ("{2$$ and $$a|{b|c}}", ["a and b", "b and a", "a and c", "c and a"]),
    ("{2$$|$$a|b}", ["a|b", "b|a"]),
    ("{0-1$$a|b}!", ["!", "a!", "b!"]),
    ("{-1$$a|b}", ["a", "b"]),
    ("{1-$$a|b}", ["a", "b", "a,b", "b,a"]),
    ("{3-1$$a|b}", ["a", "b", "a,b", "b,a"]),
    ("{2$$__deep/one__}", ["1,2", "2,1"]),
    ("${c=red}${c} and ${c}", ["red and red"]),
    ("${c={x|y}}${c}${c}", ["xx", "xy", "yx", "yy"]),
    ("${c=!{x|y}}${c}${c} {${c}|z}", ["xx x", "xx z", "yy y", "yy z"]),
    ("${c:x|y} ${c=z}${c:x}", ["x|y z"]),
    (r"\{a\|b\} \__animal__ \$\{c\} $\{d\} \%\{e\}", ["{a|b} __animal__ ${c} ${d} %{e}"]),
    (r"\${a|b}", ["$a", "$b"]),
    (r"\(a\) a_b snake__case", [r"\(a\) a_b snake__case"]),
]  # fmt: skip


@pytest.mark.parametrize(("template", "prompts"), PROMPTS)
def test_all_prompts_of_a_template(words, template, prompts):
    assert list(words.all(template, 99)) == prompts
    assert words.count(template) == len(prompts)
    drawn = {words.random(template, 1, index) for index in range(60)}
    assert drawn <= set(prompts) and len(drawn) > len(prompts) // 2


REFUSED = [
    ("__anmal__", "unknown wildcard __anmal__ (did you mean 'animal'?)"),
    ("__dri/*__", "unknown wildcard __dri/*__"),
    ("__../secret__", "__../secret__ is not a wildcard name; names are letters"),
    ("__big cat__", "__big cat__ is not a wildcard"),
    ("__~animal__", "__~animal__ is not a wildcard"),
    ("__animal(color=red)__", "is not a wildcard"),
    ("__loop__", "contains itself"),
    ("__around__", "contains itself"),
    ("{a|b", "a { is never closed"),
    ("{a|b}}", "a } without a {"),
    ("{a|b}" * 200, "the limit is 100"),
    ("{" * 30 + "}" * 30, "nested more than"),
    ("{3$$a|b}", "{3$$ asks for 3 of 2 alternatives"),
    ("{a$$b|c}", "$$ is only read after a number"),
    ("{$$a|b}", "{$$ is not understood"),
    ("{~2$$a|b}", "{~2$$ is not understood"),
    ("{!a|b}", "{! is not supported"),
    ("{-1::a|b}", "the weight -1 must be from 0"),
    ("{0::a|0::b}", "nothing to choose from has a weight above 0"),
    ("${c}", "the variable c is used before it is set"),
    ("{${c=red}|b}", "the variable c is set inside of a variant"),
    ("${c?=red}", "${c?= is not understood"),
    ("${1}", "${1} is not understood"),
    ("%{a$$b}", "%{...} is not supported"),
    ("${a={|}}" + "".join(f"${{a={'${a}' * 8}}}" for _ in range(20)) + "${a}", "grow too long"),
    ("${a=x}" + "${a={${a}|}}" * 220 + "${a}", "nested too deeply"),
    ("{2-$$" + "|" * 1500 + "}", "too many alternatives"),
]


@pytest.mark.parametrize(("template", "problem"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_not_read_is_refused_by_name(words, template, problem):
    with pytest.raises(SamplerError) as caught:
        list(words.all(template, 100))
    assert problem in str(caught.value) and "\n" not in str(caught.value)


def test_draws_follow_the_weights(words):
    def share(template, prompt, draws=4000):
        counts = Counter(words.random(template, 5, index) for index in range(draws))
        return counts[prompt] / draws

    assert share("{3::a|b}", "a") == pytest.approx(3 / 4, abs=0.03)
    assert share("__few__", "a") == pytest.approx(3 / 4, abs=0.03)
    assert share("__animal__", "red cat") == pytest.approx(1 / 6, abs=0.03)
    assert share("{2$$2::a|b|c}", "a,b") == pytest.approx(1 / 2 * 1 / 2, abs=0.03)
    assert share("{0-1$$a|b}", "") == pytest.approx(1 / 2, abs=0.03)


def test_numbers_of_prompts_are_exact_for_large_templates(words):
    assert words.count("{1-3$$a|b|c|d}") == 4 + 12 + 24
    assert words.count("{2$$" + "|".join("abcdefghij" * 50) + "}") == 500 * 499
    every = list(words.all("{1-3$$a|{b|c}|d|e}", 999))
    assert len(every) == len(set(every)) == words.count("{1-3$$a|{b|c}|d|e}")


def test_a_template_that_is_not_expanded_is_counted():
    planner = Planner(MODEL, defaults(), 4)
    texts = ["{a|b}", "__animal__", "{2$$a}", "plain", "a_b", "{json}"]
    jobs = list(planner.jobs(RawLine("f:1", {"prompt": text}) for text in texts))
    assert [job.prompt for job in jobs] == texts and planner.unexpanded == 3
