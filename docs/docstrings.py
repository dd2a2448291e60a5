"""Docstrings as Markdown, so that mkdocstrings shows this package's as they are meant."""

import re

import griffe

# Code, or a star right after a word, as in `S*` of an equation, which Markdown takes for emphasis.
CODE_OR_STAR = re.compile(r"(``.*?``|`[^`\n]*`)|(?<=[\w)])\*(?!\*)", re.DOTALL)
# Several names with one description, as in "speech, image: embeddings", and its further lines.
GROUP = re.compile(r"^( +)(\*{0,2}\w+(?:, \*{0,2}\w+)+):( .*(?:\n\1 +.*)*)", re.MULTILINE)


class ReadableDocstrings(griffe.Extension):
    """Make doctests a section, keep stars of equations, give each name of a group its own row."""

    def on_object(
        self, *, obj: griffe.Object, loader: griffe.GriffeLoader, **kwargs: object
    ) -> None:
        """Rewrite the docstring of an object once it is loaded."""
        if obj.docstring is not None:
            obj.docstring.value = readable(obj.docstring.value)


class FieldRanges(griffe.Extension):
    """Show `field(default=1, metadata={"min": 0})` as the default 1 and the range "at least 0"."""

    def on_class(self, *, cls: griffe.Class, loader: griffe.GriffeLoader, **kwargs: object) -> None:
        """Replace the value of each field, and keep its range for the table of attributes."""
        for member in cls.attributes.values():
            value = member.value
            if isinstance(value, griffe.ExprCall) and str(value.function).endswith("field"):
                given = {a.name: a.value for a in value.arguments}
                member.value = given.get("default")
                if "metadata" in given:
                    member.extra["c2f_jax"]["range"] = range_of(given["metadata"], loader)


def range_of(metadata: griffe.ExprDict, loader: griffe.GriffeLoader) -> str:
    """Return the range that the metadata of a field state, in words."""
    bounds = {str(k).strip("'"): v for k, v in zip(metadata.keys, metadata.values, strict=True)}
    if "choices" in bounds:
        choices = bounds["choices"]
        if isinstance(choices, griffe.ExprCall):  # tuple(NAMES)
            choices = choices.arguments[0]
        if isinstance(choices, griffe.ExprName):
            choices = loader.modules_collection[choices.canonical_path].value
        names = choices.keys if isinstance(choices, griffe.ExprDict) else choices.elements
        return ", ".join(str(name).replace("'", "`") for name in names)
    if {"min", "max"} <= bounds.keys():
        return f"{bounds['min']} to {bounds['max']}"
    words = {"min": "at least", "max": "at most", "above": "above", "below": "below"}
    return ", ".join(f"{text} {bounds[name]}" for name, text in words.items() if name in bounds)


def readable(text: str) -> str:
    """Return a docstring as mkdocstrings reads it.

    Args:
      text: the docstring, its indentation removed.

    >>> readable("Add one.\\n\\n>>> add(1)\\n2")
    'Add one.\\n\\nExamples:\\n  >>> add(1)\\n  2'
    >>> readable("CE(z . S*) + CE(z . I*)")
    'CE(z . S\\\\*) + CE(z . I\\\\*)'
    >>> readable("Args:\\n  a, b: sizes.")
    'Args:\\n  a: sizes.\\n  b: sizes.'
    """
    paragraphs = []
    for paragraph in text.split("\n\n"):
        if paragraph.startswith(">>> "):
            lines = [f"  {line}" for line in paragraph.splitlines()]
            paragraph = "\n".join(["Examples:", *lines])
        elif ">>> " not in paragraph and not paragraph.startswith("    "):
            paragraph = CODE_OR_STAR.sub(lambda found: found[1] or r"\*", paragraph)
        paragraphs.append(paragraph)
    return GROUP.sub(one_row_a_name, "\n\n".join(paragraphs))


def one_row_a_name(group: re.Match[str]) -> str:
    """Return a group of names as items of a section, each with the description of all."""
    indent, names, description = group.groups()
    return "\n".join(f"{indent}{name}:{description}" for name in names.split(", "))
