"nbs/index.ipynb -> README.md, as nbdev_readme does, but without Quarto."
import json
import re
from pathlib import Path

root = Path(__file__).resolve().parent.parent
WARN = "<!-- Made from nbs/index.ipynb by scripts/readme.py: change the notebook, then run make readme. -->"
HIDDEN = re.compile(r"#\|\s*(hide|include: false|default_exp|eval: false)")


def link(m):
    "A link that is right in nbs/ -> one that is right at the top."
    url = m[2]
    if re.match(r"[a-z]+:|#|/", url): return m[0]
    return f"{m[1]}({url[3:] if url.startswith('../') else 'nbs/' + url})"


def parts(cell):
    "The markdown of one cell: its prose, or its code and what that printed."
    src = "".join(cell["source"])
    if cell["cell_type"] == "markdown": yield re.sub(r"(!?\[[^\]]*\])\(([^)\s]+)\)", link, src)
    elif not HIDDEN.search(src):
        code = re.sub(r"^#\|.*\n?", "", src, flags=re.M).strip()
        if code and not re.search(r"^#\|\s*echo: false", src, re.M): yield f"```python\n{code}\n```"
        for out in cell["outputs"]:
            data = out.get("data", {})
            if any(kind.startswith("image/") for kind in data): continue  # the site shows figures, the README stays text
            text = "".join(data.get("text/markdown") or out.get("text") or data.get("text/plain") or []).rstrip()
            if text: yield text if "text/markdown" in data else "\n".join("    " + line for line in text.splitlines())


if __name__ == "__main__":
    cells = json.loads((root / "nbs/index.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "\n\n".join(part.strip("\n") for cell in cells for part in parts(cell))
    (root / "README.md").write_text(text.replace("\n", f"\n\n{WARN}\n", 1) + "\n", encoding="utf-8")
