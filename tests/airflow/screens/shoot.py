"""Takes the documentation's pictures of a running Airflow in headless Chromium: needs selenium, and no Airflow.

python shoot.py http://127.0.0.1:8080 RUN_ID FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

SWITCHES = (
    *("headless=new", "no-sandbox", "disable-gpu", "hide-scrollbars", "window-size=1400,1000"),
    *("disable-background-networking", "disable-component-update", "disable-sync", "no-proxy-server"),
)


class Browser:
    """Chromium on one Airflow."""

    def __init__(self, url: str, folder: Path) -> None:
        options = webdriver.ChromeOptions()
        for switch in SWITCHES:
            options.add_argument(f"--{switch}")
        self.driver = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
        self.url, self.folder = url, folder

    def until(self, seen: Callable[[Any], Any]) -> Any:
        return WebDriverWait(self.driver, 60).until(seen)

    def shows(self, text: str) -> None:
        """Wait until the page holds this text."""
        self.until(lambda driver: text in driver.find_element(By.TAG_NAME, "body").text)

    def open(self, path: str, shows: str) -> None:
        self.driver.get(self.url + path)
        self.shows(shows)

    def click(self, xpath: str) -> None:
        # Animations cover what is to be clicked for a moment.
        self.until(lambda driver: driver.find_element(By.XPATH, xpath))
        self.driver.execute_script("arguments[0].click()", self.driver.find_element(By.XPATH, xpath))

    def shoot(self, name: str) -> None:
        self.driver.save_screenshot(str(self.folder / f"{name}.png"))


def pages_of_the_run(browser: Browser, run: str) -> None:
    browser.open(f"/dags/training/runs/{run}", "7 Task Instances")
    browser.shoot("airflow-grid")
    task = f"/dags/training/runs/{run}/tasks/train/mapped/4"
    browser.open(task, "epoch 8/8")
    browser.shoot("airflow-log")
    browser.open(f"{task}/xcom", "return_value")
    browser.click("//button[contains(@aria-label, 'xpand')]")
    browser.shows("0.1113")
    browser.shoot("airflow-xcom")


def connection_form(browser: Browser) -> None:
    browser.open("/connections", "Add Connection")
    browser.click("//button[@aria-label='Edit Connection']")
    browser.shows("Extra Fields JSON")
    browser.click("//button[normalize-space()='Extra Fields']")
    browser.shows("Where tasks run")
    browser.shoot("airflow-connection")
    browser.open("/connections", "Add Connection")
    browser.click("//button[@aria-label='Test Connection']")
    browser.shows("it answers")
    browser.shoot("airflow-connection-test")


def main() -> None:
    url, run, folder = sys.argv[1:]
    browser = Browser(url, Path(folder))
    try:
        pages_of_the_run(browser, run)
        connection_form(browser)
    except Exception:
        browser.shoot("as-it-was")
        raise
    finally:
        browser.driver.quit()


if __name__ == "__main__":
    main()
