"""GPU facts, from nvidia-smi's XML of an H100 (driver 580.159, shortened) and from lines of a kernel log."""

from __future__ import annotations

import datetime
import stat
from pathlib import Path

import pytest

from vime.node.gpus import gpu_facts, parse_smi, parse_xids

HEALTHY = """
    <gpu id="00000000:00:06.0">
        <product_name>NVIDIA H100 80GB HBM3</product_name>
        <uuid>GPU-1a2b</uuid>
        <mig_mode><current_mig>Disabled</current_mig><pending_mig>Disabled</pending_mig></mig_mode>
        <gpu_recovery_action>None</gpu_recovery_action>
        <fb_memory_usage><total>81559 MiB</total><reserved>480 MiB</reserved><used>0 MiB</used></fb_memory_usage>
        <ecc_errors>
            <volatile>
                <sram_correctable>5</sram_correctable>
                <sram_uncorrectable_parity>0</sram_uncorrectable_parity>
                <sram_uncorrectable_secded>0</sram_uncorrectable_secded>
                <dram_correctable>0</dram_correctable>
                <dram_uncorrectable>0</dram_uncorrectable>
            </volatile>
            <aggregate><dram_uncorrectable>9</dram_uncorrectable></aggregate>
        </ecc_errors>
        <remapped_rows>
            <remapped_row_unc>0</remapped_row_unc>
            <remapped_row_pending>No</remapped_row_pending>
            <remapped_row_failure>No</remapped_row_failure>
        </remapped_rows>
    </gpu>"""
SICK = (
    HEALTHY.replace("00000000:00:06.0", "00000000:00:07.0")
    .replace("<dram_uncorrectable>0<", "<dram_uncorrectable>2<")
    .replace("secded>0<", "secded>1<")
    .replace("pending>No<", "pending>Yes<")
    .replace("action>None<", "action>GPU Reset<")
    .replace("<used>0 MiB<", "<used>1000 MiB<")
)
OLD = '<gpu id="8"><product_name>Tesla K80</product_name><ecc_errors><volatile>N/A</volatile></ecc_errors></gpu>'


def xml(*gpus: str) -> str:
    head = "<driver_version>580.159.04</driver_version><cuda_version>13.0</cuda_version>"
    body = f"<nvidia_smi_log>{head}{''.join(gpus)}</nvidia_smi_log>"
    return f'<?xml version="1.0" ?><!DOCTYPE nvidia_smi_log SYSTEM "v13.dtd">{body}'


def test_a_healthy_gpu_and_a_sick_one() -> None:
    found = parse_smi(xml(HEALTHY, SICK))
    assert (found["driver"], found["cuda"]) == ("580.159.04", "13.0")
    healthy, sick = found["gpus"]
    assert healthy == {
        "bus": "00000000:00:06.0", "uuid": "GPU-1a2b", "name": "NVIDIA H100 80GB HBM3",
        "memory_total": 81559 * 2**20, "memory_used": 0,
        "ecc_uncorrectable": 0, "remap_pending": "No", "remap_failed": "No", "recovery_action": None, "mig": "Disabled",
    }  # fmt: skip
    changed = {name: sick[name] for name in sick if sick[name] != healthy[name]}
    assert changed == {
        "bus": "00000000:00:07.0", "memory_used": 1000 * 2**20, "ecc_uncorrectable": 3, "remap_pending": "Yes",
        "recovery_action": "GPU Reset",
    }  # fmt: skip


def test_what_a_gpu_does_not_tell_is_none() -> None:
    (gpu,) = parse_smi(xml(OLD))["gpus"]
    assert [name for name in gpu if gpu[name] is None] == [
        "uuid", "memory_total", "memory_used", "ecc_uncorrectable", "remap_pending", "remap_failed", "recovery_action",
        "mig",
    ]  # fmt: skip


NOW = datetime.datetime(2026, 11, 24, 12, 0, tzinfo=datetime.UTC)
LOG = """\
2026-11-24T11:00:00,597965+00:00 vdcbr0: port 4(vdc4) entered blocking state
2026-11-24T11:00:01,000000+00:00 NVRM: Xid (PCI:0000:1a:00): 79, pid=4242, name=python, GPU has fallen off the bus.
2026-11-24T11:00:02,000000+00:00 NVRM: Xid (PCI:0000:1b:00): 31, pid=4243, name=python, Ch 00000008, MMU Fault
2026-11-20T11:00:02,000000+00:00 NVRM: Xid (PCI:0000:1c:00): 48, pid=4243, DBE
"""


def test_xids_of_hardware_in_the_last_day_count() -> None:
    assert parse_xids(LOG, NOW) == [{"bus": "0000:1a:00", "xid": 79, "meaning": "GPU has fallen off the bus"}]


@pytest.mark.parametrize(
    ("script", "error"),
    [("echo oh; echo dead GPU; exit 15", "nvidia-smi exited with 15: dead GPU"), ("echo no XML", "is not XML")],
)
def test_an_nvidia_smi_that_fails_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, error: str
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert error in gpu_facts()["error"]
