"""Carry `user` and `repo` of settings.ini into every badge, link and citation.

CITATION.cff holds the coordinates that are in force; `--check` exits 1 where they differ from settings.ini."""
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).resolve().parent.parent
FILES = ("*.ipynb", "*.md", "*.cff", "*.yml", "*.html")


def settings():
    "`(user, repo)` of settings.ini."
    cfg = ConfigParser(delimiters=["="])
    cfg.read(root / "settings.ini", encoding="utf-8")
    return cfg["DEFAULT"]["user"], cfg["DEFAULT"]["repo"]


def current():
    "`(user, repo)` of CITATION.cff."
    text = (root / "CITATION.cff").read_text(encoding="utf-8")
    return re.search(r"^repository-code: .*github\.com/([\w.-]+)/([\w.-]+)\"?$", text, re.M).groups()


def rewrite(text, old, new):
    "Replace GitHub, Colab and Pages addresses of `old` by those of `new`."
    text = re.sub(rf"(github\.com/|colab/github/|com/github/){re.escape('/'.join(old))}\b", rf"\g<1>{'/'.join(new)}", text)
    return text.replace(f"{old[0]}.github.io/{old[1]}", f"{new[0]}.github.io/{new[1]}")


def main():
    old, new = current(), settings()
    if "--check" in sys.argv:
        sys.exit(f"settings.ini says {new}, CITATION.cff {old}: run make coordinates" if old != new else 0)
    for name in subprocess.check_output(["git", "ls-files", *FILES], cwd=root, text=True).splitlines():
        before = (root / name).read_text(encoding="utf-8")
        after = rewrite(before, old, new)
        if after != before: (root / name).write_text(after, encoding="utf-8"); print("rewrote", name)


if __name__ == "__main__": main()
