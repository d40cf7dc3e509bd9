"""docs/errors.md says of every exit code how to resolve it, in the words that the code uses."""

import ast
import re
from pathlib import Path

from hfedmoe_ray import errors
from hfedmoe_ray.errors import HFedMoEError

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "errors.md").read_text()


def test_every_exit_code_has_its_section_and_names_its_exception():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, HFedMoEError)]
    assert len(kinds) == 9
    headings = {int(code) for code in re.findall(r"^## (\d+): ", PAGE, re.MULTILINE)}
    assert headings == {kind.exit_code for kind in kinds} | {130}
    for kind in set(kinds) - {HFedMoEError}:
        assert re.search(rf"\[{kind.exit_code}\].* `{kind.__name__}` ", PAGE)
    titles = re.findall(r"^## (.+)$", PAGE, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGE)) == anchors


def test_every_message_that_is_quoted_is_one_of_the_code():
    said = "\n".join(
        node.value
        for file in (REPOSITORY / "hfedmoe_ray").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    quoted = [" ".join(phrase.split()) for phrase in re.findall(r"(?<!\*)\*([^*]+)\*(?!\*)", PAGE)]
    assert len(quoted) > 20
    assert [phrase for phrase in quoted if phrase not in said and phrase != "Version mismatch"] == []
    assert "Version mismatch" in said, "Ray's own words, which the code looks for"
