"""All metadata lives in settings.ini (shared with nbdev); edit it there, not here."""
from configparser import ConfigParser
from pathlib import Path

import setuptools

here = Path(__file__).resolve().parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]


def lines(key):
    "A list setting: one item a line, blank lines and comments dropped."
    return [o.strip() for o in cfg.get(key, "").splitlines() if o.strip() and not o.strip().startswith("#")]


spdx = {"apache2": "Apache-2.0", "mit": "MIT", "bsd3": "BSD-3-Clause"}
extras = {name: lines(f"{name}_requirements") for name in ("models", "offline", "app", "dev")}
extras["all"] = extras["models"] + extras["offline"] + extras["app"]

setuptools.setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    project_urls={"Documentation": cfg["doc_host"] + cfg["doc_baseurl"]},
    license=spdx[cfg["license"]],
    keywords=cfg["keywords"].split(),
    python_requires=">=" + cfg["min_python"],
    packages=setuptools.find_packages(include=["arr_course", "arr_course.*"]),
    package_data={"arr_course": ["weights/*.safetensors", "weights/*.json"]},
    include_package_data=False,
    install_requires=lines("requirements"),
    extras_require=extras,
    entry_points={
        "console_scripts": lines("console_scripts"),
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
