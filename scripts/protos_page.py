"""Writes docs/protos.md from the protos and their comments. `--check` fails if it differs."""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)
from grpc_tools import protoc

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "protos.md"

HEAD = """# The wire contract

Every service, message and field that crosses a process, with its comment: who writes it, who reads
it. Whatever speaks `keel.rollout.v1` is an engine; the trainer knows nothing else of it. Version 1
only grows: removing or renumbering fails a test.

*Generated from `protos/keel/*/v1/*.proto` by `scripts/protos_page.py`; do not edit.*
"""

# field numbers in descriptor.proto, of which the places in the source information are made
_MESSAGES, _ENUMS, _SERVICES = 4, 5, 6  # of a file
_MEMBERS = 2  # fields of a message, values of an enum, methods of a service


def page() -> str:
    """The whole page; services first, then the types that they are made of."""
    files = sorted(_descriptors().file, key=lambda file: (not file.service, file.name))
    names = [kind.name for file in files for kind in (*file.message_type, *file.enum_type)]
    if len(set(names)) < len(names):
        sys.exit("protos_page.py: two types of one name, links would be ambiguous")
    return HEAD + "".join(_File(file).text() for file in files)


def _descriptors() -> FileDescriptorSet:
    """All protos of the contract, compiled with their comments."""
    names = sorted(
        str(path.relative_to(ROOT / "protos")) for path in ROOT.glob("protos/keel/*/v1/*.proto")
    )
    well_known = str(resources.files("grpc_tools") / "_proto")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "set.binpb"
        flags = [f"-I{ROOT / 'protos'}", f"-I{well_known}", "--include_source_info"]
        if protoc.main(["protoc", *flags, f"--descriptor_set_out={out}", *names]):
            sys.exit("protos_page.py: the protos do not compile")
        return FileDescriptorSet.FromString(out.read_bytes())


class _File:
    """One proto as Markdown."""

    def __init__(self, file: FileDescriptorProto) -> None:
        self.file = file
        self.comments = {
            tuple(location.path): location.leading_comments or location.trailing_comments
            for location in file.source_code_info.location
        }

    def text(self) -> str:
        """A section of the page."""
        parts = [f"\n## {self.file.package}\n", f"`protos/{self.file.name}`\n"]
        for number, service in enumerate(self.file.service):
            parts += self._service(service, (_SERVICES, number))
        for number, message in enumerate(self.file.message_type):
            parts += self._message(message, (_MESSAGES, number))
        for number, enum in enumerate(self.file.enum_type):
            parts += self._enum(enum, (_ENUMS, number))
        return "\n".join(parts) + "\n"

    def _service(self, service: ServiceDescriptorProto, path: tuple[int, ...]) -> list[str]:
        rows = []
        for number, method in enumerate(service.method):
            takes, gives = (
                f"{'stream ' if streams else ''}{self._link(kind)}"
                for streams, kind in (
                    (method.client_streaming, method.input_type),
                    (method.server_streaming, method.output_type),
                )
            )
            said = self._line((*path, _MEMBERS, number))
            rows.append(f"| `{method.name}` | {takes} | {gives} | {said} |")
        return self._section("service", service.name, path, "| call | takes | gives | |", rows)

    def _message(self, message: DescriptorProto, path: tuple[int, ...]) -> list[str]:
        if message.nested_type or message.enum_type:  # none today: say so rather than lose one
            sys.exit(f"protos_page.py: {message.name} nests a type, which this page cannot show")
        rows = []
        for number, field in enumerate(message.field):
            said = self._line((*path, _MEMBERS, number))
            if field.HasField("oneof_index") and not field.proto3_optional:
                said = f"*One of `{message.oneof_decl[field.oneof_index].name}`.* {said}"
            rows.append(f"| {field.number} | `{field.name}` | {self._type(field)} | {said} |")
        return self._section("message", message.name, path, "| # | field | type | |", rows)

    def _enum(self, enum: EnumDescriptorProto, path: tuple[int, ...]) -> list[str]:
        rows = [
            f"| {value.number} | `{value.name}` | {self._line((*path, _MEMBERS, number))} |"
            for number, value in enumerate(enum.value)
        ]
        return self._section("enum", enum.name, path, "| # | value | |", rows)

    def _section(
        self, noun: str, name: str, path: tuple[int, ...], head: str, rows: Sequence[str]
    ) -> list[str]:
        lines = [f"### {name}\n", f"*{noun}*\n", f"{_escape(self._said(path))}\n"]
        if rows:
            lines += [head, "|" + " --- |" * head.count(" |"), *rows, ""]
        return lines

    def _said(self, path: tuple[int, ...]) -> str:
        """The comment before a declaration, its paragraphs apart by an empty line."""
        lines = (line.strip() for line in self.comments.get(path, "").splitlines())
        return "\n".join(lines).strip()

    def _line(self, path: tuple[int, ...]) -> str:
        return _escape(" ".join(self._said(path).split()))

    def _type(self, field: FieldDescriptorProto) -> str:
        scalar = FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
        kind = self._link(field.type_name) if field.type_name else f"`{scalar}`"
        if field.label == FieldDescriptorProto.LABEL_REPEATED:
            return f"repeated {kind}"
        return f"optional {kind}" if field.proto3_optional else kind

    def _link(self, full_name: str) -> str:
        package, _, name = full_name.lstrip(".").rpartition(".")
        shown = name if package == self.file.package else f"{package}.{name}"
        return f"[`{shown}`](#{name.lower()})" if package.startswith("keel.") else f"`{shown}`"


def _escape(text: str) -> str:
    """A comment as Markdown: `code` stays, nothing else in it is markup."""
    pieces = text.replace("|", "\\|").split("`")
    pieces[::2] = [re.sub(r"([<>*])", r"\\\1", piece) for piece in pieces[::2]]
    return "`".join(pieces)


if __name__ == "__main__":
    text = page()
    if sys.argv[1:] == ["--check"]:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
            sys.exit("docs/protos.md is not what the protos say: run make docs")
    else:
        PAGE.write_text(text, encoding="utf-8")
