"""The page that trace evaluate writes, opened from its file in a real Chromium."""

import pytest

from tests.browser.test_viewer import browser  # noqa: F401 (a fixture)
from tests.tracer.test_evaluate_command import tiny_record
from tracer.evaluation_page import evaluation_page

pytestmark = pytest.mark.browser

HOSTILE = '"><img src=x onerror=window.__pwned=1><script>window.__pwned=1</script>'


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_opens_fits_and_fetches_nothing(browser, tmp_path, scheme, width):  # noqa: F811
    record = tiny_record()
    record["graphs"]["prompts"][0]["prompt"] = HOSTILE
    file = tmp_path / "page.html"
    file.write_text(evaluation_page(record), encoding="utf-8")
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
    page, problems, requests = context.new_page(), [], []
    page.on("console", lambda message: problems.append(message.text))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(file.as_uri())
    assert (problems, requests) == ([], [file.as_uri()])
    assert page.evaluate("window.__pwned") is None
    assert page.get_by_text(HOSTILE, exact=True).is_visible()
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
    ground = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert ground == {"light": "rgb(244, 245, 247)", "dark": "rgb(14, 17, 22)"}[scheme]
    heights = page.evaluate("[...document.querySelectorAll('svg')].map(svg => svg.getBoundingClientRect().height)")
    assert len(heights) == 8 and min(heights) > 100
    context.close()
