"""docs/environment.md lists exactly the environment variables that the project reads."""

import ast
import re
from pathlib import Path

from sclkern.tools.doctor import VARIABLES

ROOT = Path(__file__).parent.parent
TABLES = re.findall(r"^\| variable .*?(?=\n\n|\Z)", (ROOT / "docs" / "environment.md").read_text(), re.M | re.S)
DOCTOR, TOOLS, MAKE = ([*re.findall(r"^\| `(\w+)`", table, re.M)] for table in TABLES)


def is_environ(node):
    return isinstance(node, ast.Attribute) and node.attr == "environ"


def variables_read(source):
    """Names of environment variables that a module reads, or sets unless they are set."""
    tree = ast.parse(source)
    constants = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    keys = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and is_environ(node.value):
            keys.append(node.slice)
        elif isinstance(node, ast.Compare) and any(map(is_environ, node.comparators)):
            keys.append(node.left)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            method = node.func
            if method.attr == "getenv" or (method.attr in ("get", "setdefault", "pop") and is_environ(method.value)):
                keys.append(node.args[0])
    names = {key.value for key in keys if isinstance(key, ast.Constant)}
    return names | {constants[key.id] for key in keys if isinstance(key, ast.Name) and key.id in constants}


def test_every_form_of_reading_is_recognised():
    source = """
import os
NAME = "F"
os.environ["A"]; os.environ.get("B"); os.getenv("C"); "D" in os.environ; os.environ.setdefault("E", "1")
os.environ[NAME]
"""
    assert variables_read(source) == set("ABCDEF")


def test_the_page_lists_every_variable_and_no_other():
    files = [
        ROOT / "setup.py",
        *(f for folder in ("sclkern", "kernels", "benchmarks") for f in (ROOT / folder).rglob("*.py")),
    ]
    read = set(VARIABLES).union(*(variables_read(file.read_text()) for file in files))
    assert len(read) > 8
    assert sorted(DOCTOR + TOOLS) == sorted(read)


def test_the_doctor_prints_its_table():
    assert sorted(DOCTOR) == sorted(VARIABLES)


def test_the_page_lists_the_variables_of_make():
    text = (ROOT / "Makefile").read_text()
    read = set(re.findall(r"^(\w+) \?=", text, re.M)) | set(re.findall(r"\$\((\w+_ARGS)\)", text))
    assert set(MAKE) == read
