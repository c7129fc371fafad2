"""The page of a report in headless Chromium, opened from disk."""

import json
import shutil
import time

import pytest
from etils import epath

from pspnet_jax.analysis import page
from tests.analysis import documents

pytest.importorskip("plotly", reason="the extra train is not installed")
selenium = pytest.importorskip("selenium.webdriver", reason="runs a browser: pip install -e '.[dev]'")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (BROWSER and DRIVER), reason="no chromium and chromedriver: apt-get install chromium chromium-driver"
    ),
]
FLAGS = "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --disable-dev-shm-usage"
NAMES = ["sky", '<u>road</u> & "path"', "it's #1 50%", "Straße", "never"]
IMAGES = 60


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a report #1 50% é")
    document = documents.write(folder, IMAGES, NAMES, against=True)
    page.write(document, epath.Path(folder))
    return document, (folder / "index.html").as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = selenium.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser, report):
    """Opens the page at a hash, in a window of a width, in light or dark; no message may be in the console afterwards."""

    def open_page(hash: str = "", width: int = 1280, scheme: str = "light"):
        metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        emulate(browser, scheme)
        browser.get("about:blank")
        browser.get(report[1] + hash)
        until(lambda: script(browser, "document.getElementById('found')?.textContent"))
        return browser

    yield open_page
    assert browser.get_log("browser") == []


def emulate(browser, scheme: str) -> None:
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def until(condition, seconds: float = 60):
    """Returns the first true result of a function that is called again and again."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


def script(browser, code: str, *arguments):
    return browser.execute_script(f"return {code}", *arguments)


def rectangle(browser, selector: str) -> dict[str, float]:
    return script(browser, "document.querySelector(arguments[0]).getBoundingClientRect().toJSON()", selector)


def shown(browser) -> list[str]:
    """The names of the images in the list."""
    return script(browser, "[...document.querySelectorAll('#gallery .name')].map((name) => name.textContent)")


def found(browser) -> str:
    return script(browser, "document.getElementById('found').textContent")


def press(browser, *keys: str) -> None:
    selenium.ActionChains(browser).send_keys(*keys).perform()


def click(browser, selector: str) -> None:
    script(browser, "document.querySelector(arguments[0]).click()", selector)


def test_nothing_is_loaded_from_elsewhere(opened):
    """Charts are drawn when they come near the screen."""
    browser = opened()
    charts = script(browser, "document.querySelectorAll('[data-chart]').length")
    assert charts == 11
    for index in range(charts):
        script(browser, "document.querySelectorAll('[data-chart]')[arguments[0]].scrollIntoView()", index)
        until(lambda: script(browser, "'drawn' in document.querySelectorAll('[data-chart]')[arguments[0]].dataset", index))  # noqa: B023
    messages = [json.loads(line["message"])["message"] for line in browser.get_log("performance")]
    loaded = [one["params"]["request"]["url"] for one in messages if one["method"] == "Network.requestWillBeSent"]
    assert len(loaded) > 10
    assert [url for url in loaded if url.startswith(("http:", "https:", "ws:", "wss:"))] == []


def test_pictures_are_loaded_when_they_come_near_the_screen(opened):
    browser = opened()
    loaded = "[...document.querySelectorAll('#gallery img')].filter((picture) => picture.naturalWidth).length"
    assert script(browser, loaded) < 20
    script(browser, "document.getElementById('gallery').scrollIntoView()")
    until(lambda: script(browser, loaded) > 20)


def test_images_are_filtered_ordered_and_listed_in_parts(opened, report):
    images = report[0]["images"]
    browser = opened()
    worst = [image["name"] for image in sorted(images, key=lambda image: image["mean_iou"])]
    assert shown(browser) == worst[:48]
    click(browser, "#more")
    assert shown(browser) == worst
    browser = opened("#images&class=2&smallest=256&order=uncertain")
    chosen = [image for image in images if 2 in image["truth"] + image["predicted"] and image["smallest"] < 256]
    expected = [image["name"] for image in sorted(chosen, key=lambda image: image["confidence"])]
    assert 0 < len(expected) < 48
    assert shown(browser) == expected
    assert found(browser) == f"{len(expected)} of {IMAGES} images"
    assert script(browser, "[filter.elements.class.value, filter.elements.smallest.value]") == ["2", "256"]


def test_a_confusion_leads_to_its_images_and_back(opened, report):
    first = report[0]["confusions"][0]
    losses = [
        sum(n for t, p, n in image["errors"] if (t, p) == (first["truth"], first["predicted"])) for image in report[0]["images"]
    ]
    expected = [index for index in sorted(range(IMAGES), key=lambda index: -losses[index]) if losses[index]]
    browser = opened("#confusions")
    click(browser, "#confusions h3 ~ * a[href*='truth=']:not([href*='either']):not([href*='image='])")
    until(lambda: found(browser) == f"{len(expected)} of {IMAGES} images")
    assert shown(browser) == [report[0]["images"][index]["name"] for index in expected[:48]]
    browser.back()
    until(lambda: script(browser, "location.hash") == "#confusions")
    browser.forward()
    click(browser, "#gallery a")
    until(lambda: script(browser, "viewer.open"))
    filtered = f"#images&truth={first['truth']}&predicted={first['predicted']}"
    assert script(browser, "location.hash") == f"{filtered}&image={expected[0]}"
    for close in (browser.back, lambda: click(browser, "#close")):
        close()
        until(lambda: script(browser, "[viewer.open, location.hash]") == [False, filtered])
        assert found(browser) == f"{len(expected)} of {IMAGES} images"
        click(browser, "#gallery a")
        until(lambda: script(browser, "viewer.open"))


def test_a_cell_of_the_confusion_matrix_leads_to_its_images(opened, report):
    """On the diagonal, where nothing is confused, to those of the class."""
    browser = opened()
    for cell, expected in (([1, 2], {"truth": 1, "predicted": 2}), ([1, 1], {"class": 1})):
        assert script(browser, "TARGETS.confusion_matrix({ pointIndex: arguments[0] })", cell) == expected


def test_the_viewer_is_used_by_keyboard(opened, report):
    from selenium.webdriver import Keys

    order = sorted(range(IMAGES), key=lambda index: report[0]["images"][index]["mean_iou"])
    browser = opened(f"#images&image={order[0]}&box=12,8,24,16")

    def title() -> str:
        return script(browser, "document.getElementById('viewer-title').textContent")

    def right() -> str:
        return script(browser, "document.querySelector('.layer.right img').getAttribute('src')")

    box, picture, line = (rectangle(browser, selector) for selector in (".left .box", ".left img", "#line"))
    shares = (box["x"] - picture["x"]) / picture["width"], (box["y"] - picture["y"]) / picture["height"]
    assert shares == pytest.approx((8 / 64, 12 / 48), abs=0.01)
    assert line["x"] + line["width"] / 2 == pytest.approx(box["x"] + box["width"] / 2, abs=picture["width"] / 100)
    press(browser, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    assert title() == report[0]["images"][order[1]]["name"]
    press(browser, "4")
    assert right().endswith(f"{order[1]:06d}%20%23error%25.png")
    press(browser, "+", "+")
    assert script(browser, "new DOMMatrix(getComputedStyle(stage.querySelector('.right .frame')).transform).a") == 2.25
    press(browser, "0")
    assert script(browser, "place.zoom") == 1
    script(browser, "divider.focus()")
    press(browser, Keys.HOME, *[Keys.ARROW_RIGHT] * 20)
    assert title() == report[0]["images"][order[1]]["name"]
    clips = "['left', 'right'].map((side) => getComputedStyle(stage.querySelector(`.layer.${side}`)).clipPath)"
    assert script(browser, clips) == ["inset(0px 80% 0px 0px)", "inset(0px 0px 0px 20%)"]
    press(browser, Keys.ESCAPE)
    until(lambda: not script(browser, "viewer.open"))
    assert script(browser, "location.hash") == "#images&right=error"
    press(browser, "/")
    assert script(browser, "document.activeElement.name") == "name"
    press(browser, "<7>")
    assert shown(browser) == [report[0]["images"][7]["name"]]


def test_the_divider_and_the_pictures_are_dragged(opened):
    browser = opened("#images&image=0")
    stage, line = (browser.find_element("id", name) for name in ("stage", "line"))
    selenium.ActionChains(browser).drag_and_drop_by_offset(line, 200, 0).perform()
    at = script(browser, "Number(stage.style.getPropertyValue('--divider'))")
    assert at == pytest.approx(0.5 + 200 / stage.size["width"], abs=0.01)
    press(browser, "+")
    selenium.ActionChains(browser).move_to_element_with_offset(stage, -300, 0).click_and_hold().move_by_offset(40, 30).perform()
    selenium.ActionChains(browser).release().perform()
    assert script(browser, "[place.x, place.y]") == [40, 30]


def test_two_fingers_zoom(opened):
    """From a distance of 60 pixels to 180, around a point that stays where it is."""
    browser = opened("#images&image=0", width=360)
    stage = rectangle(browser, "#stage")
    x, y = stage["x"] + stage["width"] / 2, stage["y"] + stage["height"] / 2
    for kind, half in (("touchStart", 30), ("touchMove", 60), ("touchMove", 90)):
        points = [{"x": x + 20 + side * half, "y": y, "id": side + 1} for side in (-1, 1)]
        browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    assert script(browser, "[place.zoom, place.x].map((value) => Math.round(10 * value) / 10)") == pytest.approx(
        [3, -40], abs=2
    )


def test_tables_are_sorted_by_their_headings(opened, report):
    """Numbers descending, then ascending; the class that does not occur stays last."""
    scores = [one["iou"]["value"] for one in report[0]["classes"]]
    order = sorted(range(len(NAMES) - 1), key=lambda k: -scores[k])
    browser = opened("#classes")

    def rows() -> list[str]:
        return script(browser, "[...document.querySelectorAll('#classes tbody th')].map((cell) => cell.textContent.trim())")

    click(browser, "#classes th:nth-child(2) button")
    assert rows() == [NAMES[k] for k in order] + ["never"]
    assert script(browser, "document.querySelector('#classes th:nth-child(2)').ariaSort") == "descending"
    click(browser, "#classes th:nth-child(2) button")
    assert rows() == [NAMES[k] for k in order[::-1]] + ["never"]


def test_light_and_dark(opened):
    """Charts follow when the theme changes."""
    browser = opened()
    colors = "[getComputedStyle(document.body).backgroundColor, document.querySelector('[data-chart] .xtick text').style.fill]"
    until(lambda: script(browser, "document.querySelector('[data-chart] .xtick text')"))
    light = script(browser, colors)
    emulate(browser, "dark")
    assert until(lambda: (now := script(browser, colors))[1] != light[1] and now) == ["rgb(16, 19, 22)", "rgb(228, 232, 236)"]
    assert light == ["rgb(247, 248, 249)", "rgb(27, 32, 38)"]


@pytest.mark.parametrize("hash", ["", "#images&image=0"])
def test_a_phone_is_never_scrolled_sideways(opened, hash):
    browser = opened(hash, width=360)
    assert script(browser, "document.documentElement.scrollWidth") == 360
    assert script(browser, "[viewer.scrollWidth, viewer.clientWidth]") in ([360, 360], [0, 0])


def test_a_hash_of_nonsense_shows_all_images(opened):
    browser = opened("#images&image=999&order=hasOwnProperty&show=x&left=y")
    assert found(browser) == f"{IMAGES} of {IMAGES} images"
    assert not script(browser, "viewer.open")
