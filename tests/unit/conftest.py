"""Hypothesis profiles (`quick` for `scripts/test unit`, the default for the whole run), and domains
on fakes.
"""

from contextlib import asynccontextmanager

import pytest
from hypothesis import settings

import qmpvcpu
from tests.support.fake_agent import serve_agent
from tests.support.fake_qmp import serve
from tests.support.home import Home

settings.register_profile("quick", max_examples=25, deadline=None)
settings.register_profile("full", deadline=None)
settings.load_profile("full")


@pytest.fixture
def running(tmp_path):
    """`async with running(qemu) as domain`: connected to a scripted QEMU."""

    @asynccontextmanager
    async def start(qemu, **options):
        async with serve(tmp_path, qemu.script) as path, qmpvcpu.connect(path, **options) as domain:
            yield domain

    return start


@pytest.fixture
def with_guest(tmp_path):
    """`async with with_guest(guest) as domain`: connected to a scripted guest and its QEMU."""

    @asynccontextmanager
    async def start(guest):
        async with serve(tmp_path, guest.qemu.script) as qmp, serve_agent(tmp_path, guest) as agent:
            async with qmpvcpu.connect(qmp, agent=agent) as domain:
                yield domain

    return start


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("QMPVCPU_STATE", str(tmp_path / "state"))
    return Home(tmp_path)
