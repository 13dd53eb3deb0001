"""What decides a kernel's machine code, as a digest: while it stays the same, so does the code.

Triton's own cache key would do, but for comments and numbers of lines, which change it.
"""

import ast
import functools
import hashlib
import inspect
from types import FunctionType, ModuleType
from typing import Any

import triton
from triton import language as tl
from triton.runtime.jit import JITCallable

from ditq_kernels._triton.parts import stages

OURS = "ditq_kernels"
PLAIN = (int, float, str, bool, type(None))


def digest_of(source: Any, target: int, options: dict[str, Any]) -> str:
    """Of everything that Triton compiles from.

    Args:
        source: a Triton ASTSource.
        target: compute capability without the dot.
        options: of the compiler: warps, stages.
    """
    given = (source.signature, sorted(source.constants.items()), sorted(source.attrs.items()))
    said = [triton.__version__, target, sorted(options.items()), *given, reached_by(source.fn)]
    if stages.NEEDED:
        said.append(text_of(stages))
    return hashlib.sha256(repr(said).encode()).hexdigest()


@functools.cache
def reached_by(function: Any) -> tuple[tuple[str, str], ...]:
    """(name, text) of a jit function and of everything of ours that it reaches: functions, constants, classes."""
    found: dict[str, str] = {}
    _reach(function, found)
    return tuple(sorted(found.items()))


def text_of(thing: Any) -> str:
    """Source without comments, layout and docstrings."""
    tree = ast.parse(thing.src if isinstance(thing, JITCallable) else inspect.getsource(thing))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _says_nothing(body[0]):
            node.body = body[1:] or [ast.Pass()]  # type: ignore[attr-defined]
    return ast.unparse(tree)


def _reach(function: Any, found: dict[str, str]) -> None:
    name = f"{function.__module__}.{function.__qualname__}"
    if name in found:
        return
    found[name] = f"{getattr(function, 'noinline', False)} {text_of(function)}"
    scope = function.get_capture_scope()
    for node in ast.walk(ast.parse(function.src)):
        known, value = _value(node, scope)
        if not known or isinstance(value, ModuleType):
            continue
        if isinstance(value, JITCallable):
            if value.__module__.startswith(OURS):
                _reach(value, found)
        elif isinstance(value, (tl.constexpr, *PLAIN)):
            found[f"{function.__module__}.{ast.unparse(node)}"] = repr(value)
        elif isinstance(value, (type, FunctionType)) and value.__module__.startswith(OURS):
            found[f"{value.__module__}.{value.__qualname__}"] = text_of(value)


def _value(node: ast.AST, scope: dict[str, Any]) -> tuple[bool, Any]:
    """What a global name, or an attribute of one of our modules, stands for; a local of the same name does no harm."""
    if isinstance(node, ast.Name) and node.id in scope:
        return True, scope[node.id]
    if isinstance(node, ast.Attribute):
        known, module = _value(node.value, scope)
        if known and isinstance(module, ModuleType) and module.__name__.startswith(OURS):
            return True, getattr(module, node.attr)
    return False, None


def _says_nothing(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
