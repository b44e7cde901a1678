"""The page as a browser shows it."""

from __future__ import annotations

import html
import re

import pytest

from neuromanifold.report import render

NUM_CHARTS = 10 + 9  # the second network was not trained


@pytest.fixture(scope="module")
def light(visit, page):
    return visit(page)


@pytest.fixture(scope="module")
def dark(visit, page):
    return visit(page, dark=True)


def charts(seen) -> list[str]:
    return re.findall(r"<svg\b.*?</svg>", seen.dom, flags=re.DOTALL)


def colours(seen) -> set[str]:
    return set(re.findall(r'(?:fill|stroke)="(#\w+)"', "".join(charts(seen))))


def test_every_chart_is_drawn(light):
    assert 'data-ready="1"' in light.attributes
    assert len(charts(light)) == NUM_CHARTS
    assert all("NaN" not in chart for chart in charts(light))
    assert re.search(r'id="errors"[^>]* hidden', light.dom)


def test_the_console_stays_empty(light, dark):
    assert light.console == dark.console == []


def test_no_outside_request(light, dark):
    assert light.requests == dark.requests == []


def test_the_check_for_requests_and_errors_works(visit):
    seen = visit(
        "<!doctype html><html><body>"
        '<img src="http://outside.example/pixel.png">'
        '<script src="https://outside.example/library.js"></script>'
        '<script>fetch("http://127.0.0.1:9/data"); throw new Error("broken")</script>'
        "</body></html>"
    )
    assert seen.requests == [
        "http://127.0.0.1:9/data",
        "http://outside.example/pixel.png",
        "https://outside.example/library.js",
    ]
    assert any("broken" in line for line in seen.console)


def test_the_page_forbids_requests_of_whatever_is_in_it(visit, page):
    seen = visit(page.replace("</main>", '<img src="http://outside.example/pixel.png"></main>'))
    assert seen.requests == []
    assert any("Content Security Policy" in line for line in seen.console)


def test_names_are_text(light):
    # Had a name been taken for markup, there would be an element, or the page would have broken.
    assert "<b>" not in light.dom
    assert '&lt;b&gt;&amp;"&lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;' in light.dom


def test_every_long_name_is_written_and_keeps_its_end(visit, deep):
    shares, diagonal, *_ = charts(visit(render([deep], title="Deep")))
    for depth in range(10, 50):
        assert f">…layer.{depth}.attention.output.dense<" in shares
    for depth in range(20, 40):
        assert f">…{depth}.attention.output.dense.weight<" in diagonal


def test_headline_numbers_and_axes_are_there(light):
    text = html.unescape(re.sub(r"<[^>]+>", " ", light.dom))
    for expected in (
        "Largest stable learning rate",
        "0.227",
        "39.7% of the trace",
        "eigenvalue (nats per parameter²)",
        "damping (nats per parameter²)",
        "mean loss (nats per sample)",
        "10⁻²",
    ):
        assert expected in text


def test_charts_follow_the_colour_scheme(light, dark):
    assert 'data-ready="1"' in dark.attributes
    assert len(charts(dark)) == NUM_CHARTS
    assert colours(light)
    assert colours(light).isdisjoint(colours(dark))


def test_a_chart_that_fails_is_named_and_the_others_are_drawn(visit, conv_net):
    page = render([conv_net], title="Digits")
    broken = page.replace('"mark": {"opacity": 0.9, "size": 22, "type": "circle"}', '"mark": 3')
    assert broken != page
    seen = visit(broken)
    assert 'data-ready="0"' in seen.attributes
    assert not re.search(r'id="errors"[^>]* hidden', seen.dom)
    assert re.search(r"<li>How many directions carry the information\? \w*Error", seen.dom)
    assert len(charts(seen)) == 9


def test_a_phone_scrolls_in_one_direction_only(visit, page):
    """In a frame as wide as a phone, because a headless window cannot be that narrow."""
    seen = visit(
        f"""<!doctype html><html><body>
        <iframe style="width: 390px; height: 800px" srcdoc="{html.escape(page)}"></iframe>
        <script>
          const frame = document.querySelector("iframe");
          const look = () => {{
            const inside = frame.contentDocument.documentElement;
            if (!inside.dataset.ready) return setTimeout(look, 50);
            Object.assign(document.documentElement.dataset, {{
              ready: inside.dataset.ready,
              charts: frame.contentDocument.querySelectorAll("svg").length,
              overflow: inside.scrollWidth - inside.clientWidth,
            }});
          }};
          frame.addEventListener("load", look);
        </script></body></html>"""
    )
    assert 'data-ready="1"' in seen.attributes
    assert f'data-charts="{NUM_CHARTS}"' in seen.attributes
    assert 'data-overflow="0"' in seen.attributes
