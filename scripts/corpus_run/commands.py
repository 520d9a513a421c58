"""Every command that takes a definition, on one document: what it says, and what it leaves on disk."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from lxml import etree

from scripts.corpus_run.arguments import differences, read_args, read_words
from scripts.corpus_run.emulators import emulator
from scripts.corpus_run.files import DomainFile, parse
from scripts.corpus_run.finding import Finding
from scripts.corpus_run.said import Said, said
from tests.support.cli import Done, run_main

#: Exit codes of what is done and of what is refused.
_DONE, _REFUSED = 0, 3
#: The QEMU that is asked may die, as 10.0 does of 288 vCPUs under TCG.
_MAY_END = {"probe": (8,), "boot-args": (8,)}
#: What a finding is called where `define` refuses a document.
REFUSED = "define refuses"
#: What changes of a document with its vCPUs.
_OF_VCPUS = ("vcpu", "vcpus", "cputune")


class Commands:
    """The commands on one file. `folder` is for copies; QMPVCPU_STATE must lead to a folder of this
    process's.
    """

    def __init__(self, file: DomainFile, folder: Path) -> None:
        self.file = file
        self.copy = folder / "copy.xml"
        self.findings: list[Finding] = []
        #: Command lines of libvirt's that ours was compared with.
        self.compared = 0

    def run(self) -> list[Finding]:
        done = self._call("define", str(self.file.path))
        if done is None:
            return self.findings
        if done.code != _DONE:
            self._found(REFUSED, *_generic(done))
            return self.findings
        name = json.loads(done.stdout)["domain"]
        try:
            self._defined(name)
        finally:
            self._call("undefine", name)
        return self.findings

    def _defined(self, name: str) -> None:
        data = self.file.data
        shown = self._call("dumpxml", name, as_json=False)
        if shown is not None and shown.stdout.encode() not in (data, data + b"\n"):
            self._found("dumpxml", "is not what was defined", shown.stderr)
        was = self._vcpuinfo(name)
        if was is None:
            return
        for dialect in ("rfc", "libvirt"):
            shown = self._call("dumpxml", name, "--dialect", dialect, as_json=False)
            if shown is None or shown.code != _DONE:
                self._found(f"dumpxml {dialect}", "fails", shown.stderr if shown else "")
                continue
            self.copy.write_bytes(shown.stdout.encode())
            self._rest_is_kept(f"dumpxml {dialect}", shown.stdout.encode())
            self._read_again(f"dumpxml {dialect}", was)
            defined = self._call("define", name, "--xml", str(self.copy))
            if defined is not None and defined.code != _DONE:
                self._found(f"define of dumpxml {dialect}", *_generic(defined))
        for words in self._requests(was):
            self._change(words, was)
        self._call("define", name, "--xml", str(self.file.path))
        self._boot(name)

    def _requests(self, was: Said) -> Iterator[list[str]]:
        top, count = was.maximum, len(was.enabled)
        for total in sorted({1, max(1, top // 2), top}):
            yield ["setvcpus", str(total)]
        yield ["setvcpus", str(top), "--hotpluggable"]
        for total in sorted({1, max(1, top - 1), top + 1}):
            yield ["setvcpus", str(total), "--maximum"]
        # vCPU 0 for what is refused.
        for number in sorted({0, top - 1, was.enabled[-1]}):
            yield ["setvcpu", str(number), "--disable"]
        if count < top:
            yield ["setvcpu", str(min(was.rows.keys() - was.enabled)), "--enable"]
        if count < top:
            yield ["setvcpu", "0", "--numa-node", "--enable"]

    def _change(self, words: list[str], was: Said) -> None:
        command, *rest = words
        what = f"{command} {' '.join(rest[1:])}".strip()
        self.copy.write_bytes(self.file.data)
        dry = self._call(command, str(self.copy), *rest, "--config", "--dry-run")
        if self.copy.read_bytes() != self.file.data:
            self._found(what, "--dry-run writes")
        done = self._call(command, str(self.copy), *rest, "--config")
        if dry is None or done is None:
            return
        if dry.code != done.code:
            self._found(
                what,
                "--dry-run ends in another way",
                f"{words}: {dry.code}, {done.code}: {done.stderr}",
            )
        data = self.copy.read_bytes()
        if done.code != _DONE:
            if data != self.file.data:
                self._found(what, "refused, and the file is changed")
            return
        self._rest_is_kept(what, data)
        now = self._vcpuinfo(str(self.copy), what)
        if now is None:
            return
        number = int(rest[0])
        reached = {
            "setvcpus": len(now.enabled) == number,
            "setvcpus --maximum": now.maximum == number,
            "setvcpus --hotpluggable": len(now.enabled) == number,
            "setvcpu --enable": number in now.enabled,
            "setvcpu --disable": number not in now.enabled,
            "setvcpu --numa-node --enable": len(now.enabled) == len(was.enabled) + 1,
        }[what]
        if not reached:
            self._found(what, "is applied, and not so in the file", str(words))

    def _boot(self, name: str) -> None:
        """`probe` and `boot-args`, and libvirt's own command lines."""
        kind = self.file.root.find("os/type")
        arch, machine = (
            (kind.get("arch"), kind.get("machine")) if kind is not None else (None, None)
        )
        qemu = emulator(arch or os.uname().machine, machine)
        words = ["--emulator", qemu] if qemu is not None else []
        asks = [name, "--probe", "never", *words]
        self._call("probe", *asks)
        done = self._call("boot-args", *asks)
        is_same_accel = True
        if (
            done is not None
            and done.code == _REFUSED
            and qemu is not None
            and "without starting QEMU" in done.stdout
        ):
            is_same_accel = self.file.root.get("type") != "kvm"
            self.copy.write_bytes(self.file.data if is_same_accel else _under_tcg(self.file.data))
            asks = [str(self.copy), "--probe", "auto", *words]
            self._call("probe", *asks)
            done = self._call("boot-args", *asks)
        if done is None or not self.file.args:
            return
        if done.code != _DONE:
            self._found("boot-args", *_generic(done))
            return
        ours = read_words([word for word in json.loads(done.stdout) if isinstance(word, str)])
        for args in self.file.args:
            self.compared += 1
            libvirts = read_args(args.read_text())
            if not is_same_accel:
                ours.accel = libvirts.accel
            for text, more in differences(ours, libvirts):
                self._found("arguments", text, f"{args.name}: {more}")

    # -- one command ------------------------------------------------------------------------------

    def _call(self, *words: str, as_json: bool = True) -> Done | None:
        """Run it; None where it ends as no command may end."""
        done = run_main([*(["--json"] if as_json else []), *words])
        if (
            done.code not in (*_MAY_END.get(words[0], ()), _DONE, _REFUSED)
            or "Traceback" in done.stderr
        ):
            text = re.sub(r"\d+|'[^']*'", "…", done.stderr.strip().partition("\n")[0])
            self._found(words[0], f"exit {done.code}: {text}", f"{words[1:]}: {done.stderr}")
            return None
        return done

    def _vcpuinfo(self, word: str, what: str = "define") -> Said | None:
        done = self._call("vcpuinfo", word, "--config")
        if done is None or done.code != _DONE:
            self._found(
                "vcpuinfo", f"refuses what {what} has made", done.stdout if done is not None else ""
            )
            return None
        rows = json.loads(done.stdout)["vcpus"]
        found = Said(
            len(rows),
            {row["id"]: (row["state"] == "enabled", row["hotpluggable"], None) for row in rows},
        )
        document = said(self.copy.read_bytes() if word == str(self.copy) else self.file.data)
        if found.enabled != document.enabled or found.maximum != document.maximum:
            self._found(
                "vcpuinfo",
                "is not what the document says",
                f"{found.enabled} and {document.enabled}",
            )
        return found

    def _read_again(self, what: str, was: Said) -> None:
        now = self._vcpuinfo(str(self.copy), what)
        if now is not None and (now.maximum, now.enabled) != (was.maximum, was.enabled):
            self._found(
                what,
                "says other vCPUs than the definition",
                f"{now.enabled}, and was {was.enabled}",
            )

    def _rest_is_kept(self, what: str, data: bytes) -> None:
        """Whether all but the vCPUs is as it was."""
        try:
            kept = _rest(parse(data)) == _rest(parse(self.file.data))
        except etree.XMLSyntaxError as error:
            self._found(what, "writes what is no XML", str(error))
            return
        if not kept:
            self._found(what, "changes another part of the document")

    def _found(self, check: str, text: str, more: str = "") -> None:
        self.findings.append(Finding(self.file.name, check, text, more))


def _under_tcg(data: bytes) -> bytes:
    """The domain on the CPU of QEMU's choice: not every host has KVM, and none for each
    architecture.
    """
    root = parse(data)
    root.set("type", "qemu")
    for cpu in root.iterfind("cpu"):
        cpu.attrib.clear()
        for child in list(cpu):
            if child.tag not in ("topology", "numa"):
                cpu.remove(child)
    return etree.tostring(root)


def _rest(root: etree._Element) -> bytes:
    for child in list(root):
        if child.tag in _OF_VCPUS:
            root.remove(child)
    return b"".join(etree.tostring(root, method="c14n").split())


def _generic(done: Done) -> tuple[str, str]:
    """A refusal without what only this file has, and as it is."""
    message = json.loads(done.stdout)["error"]["message"]
    text = re.sub(r"^'[^']*': |line \d+: ", "", message)
    return re.sub(r"'[^']*'|\d[\d,-]*", "…", text)[:150], message
