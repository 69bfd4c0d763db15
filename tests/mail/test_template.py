"""Templates: what the language says, and that nothing in it breaks out or takes long."""

from __future__ import annotations

import html
from contextlib import suppress
from time import thread_time
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mailerq.mail.modifiers import MODIFIERS
from mailerq.mail.template import Template
from mailerq.mail.values import Budget, BudgetError, TemplateError

DATA: dict[str, Any] = {
    "name": "Ann",
    "nothing": None,
    "zero": 0,
    "yes": True,
    "price": 1234.5,
    "tags": ["a", "b"],
    "none": [],
    "user": {"first": "Bob", "my-key": "k", "pets": [{"kind": "cat"}]},
    "day": "2026-01-31 08:05:09",
    "html": "<b>&</b>",
}


def render(text: str, data: dict[str, Any] | None = None) -> str:
    return Template(text).render(DATA if data is None else data)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Dear {$name},", "Dear Ann,"),
        ("{$missing}{$nothing}{$user.no.such}{$name.x}{$tags.9}{$tags[-1]}", ""),
        ("{$user.first} {$user['my-key']} {$user.pets.0.kind} {$user[\"pets\"][0].kind}",
         "Bob k cat cat"),
        ("{$tags[$zero]}{$tags[1]}", "ab"),
        ("{$yes} {not $yes} {$price} {$zero}", "true {not $yes} 1234.5 0"),
        ("{if $name}1{/if}{if $nothing}2{else}3{/if}{if $none}4{elseif $zero}5{else}6{/if}", "136"),
        ("{if $zero == 0 and not $nothing}y{/if}{if !$yes || $price > 1000}y{/if}", "yy"),
        ("{if $missing == ''}a{/if}{if $missing == 0}b{/if}{if $zero == '0'}c{/if}", "abc"),
        ("{if '10' < '9'}a{/if}{if 10 > '9'}b{/if}{if $name eq 'Ann' and $name ne 'B'}c{/if}",
         "abc"),
        ("{if $name gt 'A' && $name lte 'Ann' && 1 lt 2 && 2 ge 2}x{/if}", "x"),
        ("{foreach $t in $tags}[{$t}]{/foreach}", "[a][b]"),
        ("{foreach $i => $t in $tags}{$i}{$t}{/foreach}", "0a1b"),
        ("{foreach $user.pets as $p}{$p.kind}{/foreach}", "cat"),
        ("{foreach $user as $k => $v}{$k} {/foreach}", "first my-key pets "),
        ("{foreach $t in $none}x{foreachelse}none{/foreach}", "none"),
        ("{foreach $t in $missing}x{else}none{/foreach}", "none"),
        ("{foreach $name in $tags}{$name}{/foreach}{$name}", "abAnn"),
        ("{assign $name|upper to $big}{$big}{$name}", "ANNAnn"),
        ("{1 + 2}{$zero + 1} {$zero + 2 * 3 - 1} {7 / 2}", "{1 + 2}1 5 {7 / 2}"),
        ("{(1)}{$zero + (1 + 2) * 2} {$zero - -3} {$zero + 7 / 2} {$zero + 7 % 4}",
         "{(1)}6 3 3.5 3"),
        ("{* a {$comment} *}x", "x"),
        ("{literal}{$name}{/literal} {ldelim}$name{rdelim}", "{$name} {$name}"),
        ("p{color:red} {\"a\":1} { $name } ${x} {}", "p{color:red} {\"a\":1} { $name } ${x} {}"),
        ("{$name|lower|cat:'!'|ucfirst}", "Ann!"),
        ('{$missing|default:$name|upper} {$missing|default:"a\\"b"}', 'ANN a"b'),
        ("{$price|number_format:2} {$price|number_format:1:',':'.'} {$price|round}",
         "1,234.50 1.234,5 1234"),
        ('{$day|date_format:"%A %d %B %Y, %H:%M:%S %p %%%q"}',
         "Saturday 31 January 2026, 08:05:09 AM %%q"),
        ("{$tags|join} {$tags|count} {$name|strlen} {$tags|first}{$tags|last}", "a, b 2 3 ab"),
        ("{$name|truncate:2} {$name|substr:1} {$name|substr:-2:1} {$name|replace:'n':'m'}",
         ".. nn n Amm"),
        ("{if $tags|count > 1}many{/if}", "many"),
        ("{$user.pets|jsonencode}", '[{"kind":"cat"}]'),
        ("{$html|urlencode} {$html|striptags}", "%3Cb%3E%26%3C%2Fb%3E &"),
        ("{$zero|md5}", "cfcd208495d565ef66e7dff9f98764da"),
    ],
)  # fmt: skip
def test_a_template_says(text: str, expected: str) -> None:
    assert render(text) == expected


def test_html_is_escaped_once_and_raw_is_not() -> None:
    text = "{$html} {$html|raw} {$html|raw|lower} {$html|escape} {$html|nl2br}"
    escaped = "&lt;b&gt;&amp;&lt;/b&gt;"
    assert Template(text).render(DATA, escape=html.escape) == (
        f"{escaped} <b>&</b> {escaped} {escaped} {escaped}"
    )


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{$name", "line 1: expected '}', found the end"),
        ("a\nb\n{if $name}", "line 3: {if} is not closed"),
        ("{/if}", "line 1: {/if} closes nothing"),
        ("{else}", "line 1: {else} closes nothing"),
        ("{foreach $x in $tags}{/if}", "line 1: {/if} stands within {foreach}"),
        ("{foreach $x}{/foreach}", "line 1: expected 'in' or 'as', found '}{/foreach}'"),
        ("{foreach $x in $name}{/foreach}", "line 1: foreach needs an array or an object"),
        ("{$name|shout}", "line 1: expected a modifier, found 'shout}'"),
        ("{$name|upper:1}", "line 1: the modifier upper takes 0 arguments, found 1"),
        ("{$name|replace:1}", "line 1: the modifier replace takes 2 arguments, found 1"),
        ("\n{$tags}", "line 2: expected a text, found an array"),
        ("{$name + 1}", "line 1: expected a number, found 'Ann'"),
        ("{$price / $zero}", "line 1: divides by zero"),
        ("{$price % 0}", "line 1: divides by zero"),
        ("{if $tags > 1}{/if}", "line 1: cannot compare an array"),
        ("{$name|date_format}", "line 1: expected a time, found 'Ann'"),
        ("{literal}{$name}", "line 1: {literal} is not closed"),
        ("{* x", "line 1: the comment is not closed"),
        ("{$name.__class__} {$name|__class__}", "line 1: expected a modifier, found '__class__}'"),
        ("{$name.upper()}", "line 1: expected '}', found '()}'"),
        ("{assign 1 to 2}", "line 1: expected a variable such as $x, found '2}'"),
        ("{$}", "line 1: expected a value, found '$}'"),
    ],
)
def test_a_mistake_is_named_with_its_line(text: str, error: str) -> None:
    with pytest.raises(TemplateError) as caught:
        render(text)
    assert str(caught.value) == error


LIST = {"l": list(range(1000)), "s": "ab" * 400_000, "t": "x", "p": "%Y" * 50_000}


@pytest.mark.parametrize(
    "text",
    [
        "{foreach $a in $l}{foreach $b in $l}{foreach $c in $l}{/foreach}{/foreach}{/foreach}",
        "{foreach $a in $l}{$s}{/foreach}",
        "{foreach $a in $l}{assign $t|cat:$t to $t}{/foreach}",
        "{foreach $a in $l}{$s|upper|sha256}{/foreach}",
        "{foreach $a in $l}{if $s == $s}{/if}{/foreach}",
        "{foreach $a in $l}{foreach $b in $l}{if $l|count}{/if}{/foreach}{/foreach}",
        "{$s|replace:'a':$s}",
        "{$s|cat:$s:$s:$s:$s:$s:$s:$s:$s}",
        "{$s|indent:1000000000}",
        "{$t|indent:1e9}",
        "{$s|urlencode}",
        "{$l|join:$s}",
        "{foreach $a in $l}{assign $l|jsonencode to $x}{/foreach}",
        "{foreach $a in $l}{if '2026-01-01'|date_format:$p}{/if}{/foreach}",
        "{$t|date_format:$s}",
        "{$t|" + "|".join(["upper"] * 200_000) + "}",
        "{$t" + " + 1" * 200_000 + "}",
        "{if " + "!" * 200_000 + "1}{/if}",
        "{$t" + "[0]" * 200_000 + "}",
        "{" + "(" * 100_000,
        "{$" + "(" * 100_000,
        "{if (" + "(" * 100_000,
        "{if 1}" * 100_000,
        "{$a}" * 200_000,
        "{*" * 100_000,
        "{literal}" * 100_000,
        "{$x|default:" + '"' * 99_999,
        "{$x|default:" + '"\\' * 99_999,
        "{if $x in " * 50_000,
        "{foreach $x" + " " * 1_000_000,
    ],
)
def test_what_is_made_to_be_slow_ends_soon(text: str) -> None:
    start = thread_time()
    with suppress(TemplateError):
        assert len(render(text, LIST)) <= 16 << 20
    assert thread_time() - start < 2


def test_a_budget_serves_several_templates() -> None:
    budget = Budget(steps=1000)
    template = Template("{foreach $t in $tags}{$t}{/foreach}")
    for _ in range(20):
        template.render(DATA, budget)
    budget.steps = 3
    with pytest.raises(BudgetError):
        template.render(DATA, budget)


def test_variables_that_a_template_assigns_are_gone_with_it() -> None:
    data = dict(DATA)
    render("{assign 1 to $name}{foreach $k => $name in $tags}{/foreach}", data)
    assert data == DATA


WORDS = st.sampled_from([
    "{", "}", "{$", "{if ", "{elseif ", "{else}", "{/if}", "{foreach ", "{/foreach}",
    "{foreachelse}", "{assign ", " in ", " as ", " to ", "=>", "{literal}", "{/literal}", "{*",
    "*}", "$a", "$b.c", "$list", "$o", ".0", "[", "]", "(", ")", "|", ":", '"', "'", "\\", "1",
    "2.5", "-", "+", "*", "/", "%", "==", "!=", "<", ">", "!", "not ", " and ", "||", "&&",
    "true", "null", "{ldelim}", " ", "\n", "é", "\0", "9" * 20,
    *(f"|{name}" for name in MODIFIERS), *(f":{n}" for n in (-1, 0, 3)),
])  # fmt: skip
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**40), 10**40), st.floats(), st.text(max_size=20),
    st.sampled_from([10**400, "2026-01-01", "2026-01-01 00:00:00", "12", "-1.5", "%41", "\ud800"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)
VARIABLES = st.fixed_dictionaries(
    {"a": VALUES, "b": st.fixed_dictionaries({"c": VALUES}), "list": st.lists(VALUES, max_size=4),
     "o": st.dictionaries(st.text(max_size=3), VALUES, max_size=3)}
)  # fmt: skip
TAGS = st.builds("{{{}{}}}".format, st.sampled_from(["$a", "$b.c", "$list.0", "$o"]),
                 st.lists(WORDS, max_size=5).map("".join))  # fmt: skip
TEMPLATES = st.lists(st.one_of(WORDS, TAGS, st.text(max_size=5)), max_size=12).map("".join)


@settings(max_examples=600, deadline=None)
@given(TEMPLATES, VARIABLES)
@example("{$a|round:3}", {"a": float("nan")})
@example("{$a|date_format}", {"a": float("inf")})
@example("{$a|number_format:400}", {"a": 10**300})
@example("{$a * $a * $a}", {"a": 1e200})
@example("{$list[$a]}", {"list": [1], "a": float("nan")})
@example("{if $a < $b}{/if}", {"a": float("nan"), "b": "x"})
def test_any_template_renders_or_raises_the_one_error(text: str, data: dict[str, Any]) -> None:
    try:
        template = Template(text)
        once = template.render(data, Budget(5000, 100_000))
    except TemplateError:
        return
    assert len(once) <= 100_000
    assert template.render(data, Budget(5000, 100_000)) == once


@settings(max_examples=300)
@given(st.text())
def test_a_text_without_tags_is_as_it_was(text: str) -> None:
    try:
        template = Template(text)
    except TemplateError:
        return
    if template.is_plain:
        assert template.render({}) == text


@settings(max_examples=300)
@given(st.text(), st.sampled_from(["{$x}", "{$x|upper}", "{$x|trim|default:$x}", "{$x|cat:$x}"]))
def test_no_value_brings_a_tag_of_html(value: str, text: str) -> None:
    rendered = Template(text).render({"x": value}, escape=html.escape)
    assert not set("<>\"'") & set(rendered)
