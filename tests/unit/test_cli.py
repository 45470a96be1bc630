"""The command line: what it says, and how it ends."""

from __future__ import annotations

import asyncio
import io
import logging
import os
import signal
import stat
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING

import click
import pytest
from click.testing import CliRunner
from rich.console import Console

from hotlun import BackendError, DiskConflictError, HotlunError, Slot, SlotState, SlotStatus
from hotlun.cli import main
from hotlun.cli.failures import explain, translated
from hotlun.cli.pictures import Share, SlotMap, share_table
from hotlun.cli.report import CheckFailedError, Report
from hotlun.cli.running import TerminatedError, run
from hotlun.vm import MachineError

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result

COMMANDS: tuple[list[str], ...] = (
    [],
    ["demo"],
    ["vm"],
    ["vm", "start"],
    ["vm", "list"],
    ["vm", "stop"],
    ["vm", "run"],
    ["agent"],
    ["agent", "build"],
    ["journal"],
    ["journal", "show"],
    ["journal", "forget"],
)


@pytest.fixture(autouse=True)
def own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No VM of this machine is seen, and none of this test by others."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "run").mkdir()


def hotlun(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


class TestHelp:
    @pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
    @pytest.mark.parametrize("flag", ["--help", "-h"])
    def test_is_everywhere(self, command: list[str], flag: str) -> None:
        """Each command and group says what it does and which options it has."""
        result = hotlun(*command, flag)
        assert result.exit_code == 0
        assert result.output.startswith("Usage: ")
        assert "Options:" in result.output

    def test_of_each_option_is_there(self) -> None:
        """No option or argument of any command goes without an explanation."""
        for command in COMMANDS:
            for line in hotlun(*command, "--help").output.splitlines():
                if line.startswith("  -"):
                    assert len(line.split("  ")) > 2, line

    def test_needs_little(self) -> None:
        """What is slow to import is not imported for it."""
        script = (
            "import sys, hotlun.cli;"
            "print([name for name in ('rich', 'qemu.qmp', 'hotlun.vm', 'hotlun.backends.qemu')"
            " if name in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
        assert done.stdout == b"[]\n", done.stderr

    def test_is_there_without_the_script_too(self) -> None:
        """`python -m hotlun` is `hotlun`."""
        done = subprocess.run(
            [sys.executable, "-m", "hotlun", "--help"], capture_output=True, check=True, text=True
        )
        assert done.stdout.startswith("Usage: hotlun ")


def test_the_version_is_the_packages() -> None:
    """`--version` says which hotlun this is."""
    from importlib.metadata import version

    assert version("hotlun") in hotlun("--version").output


class TestUsage:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["dome"], "No such command"),
            (["vm", "start", "--controllers", "99"], "controllers must be 1 to 8"),
            (["vm", "start", "--memory", "1"], "MiB"),
            (["vm", "start", "../x"], "a VM's name"),
            (["vm", "stop", "../x"], "a VM's name"),
            (["vm", "stop", "--all", "one"], "not both"),
            (["vm", "run", "one"], "Missing argument"),
            (["agent", "build"], "Missing argument"),
        ],
    )
    def test_that_is_wrong_ends_with_2(self, arguments: list[str], words: str) -> None:
        """What can be told from the command line alone is a usage error, and nothing is begun."""
        result = hotlun(*arguments)
        assert result.exit_code == 2
        assert words in result.stderr


class TestErrors:
    @pytest.fixture
    def ctx(self) -> click.Context:
        return click.Context(click.Command("any"))

    def test_of_the_library_become_a_line_with_a_hint(self) -> None:
        """A VM that is not there: what happened, what to do, exit code 1, nothing on stdout."""
        result = hotlun("vm", "run", "nobody", "true")
        assert result.exit_code == 1
        assert result.stdout == ""
        first, *rest = result.stderr.splitlines()
        assert first == "error: no VM called 'nobody' runs; running: none"
        assert rest == ["hint: 'hotlun vm list' shows the VMs that run; --debug shows each step"]

    def test_of_the_system_name_the_file(self, tmp_path: Path) -> None:
        """A file that cannot be written is no traceback."""
        target = str(tmp_path / "nowhere" / "agent")
        result = hotlun("agent", "build", target)
        assert result.exit_code == 1
        assert result.stderr == f"error: {target}: No such file or directory\n"

    def test_have_their_details_and_notes(self) -> None:
        """The peer's own words and what clean-up said are told too, but nothing twice."""
        error = BackendError("cannot attach: it is busy", detail="one\ntwo")
        error.add_note("then, detaching: no answer")
        (explanation,) = explain(error)
        assert explanation.message == "cannot attach: it is busy"
        assert explanation.details == ("one", "two", "then, detaching: no answer")
        (explanation,) = explain(BackendError("cannot attach: it is busy", detail="it is busy"))
        assert explanation.details == ()

    def test_have_the_hint_of_the_nearest_class(self) -> None:
        """A hint for a class is one for those below it, unless they have their own."""

        class OddError(DiskConflictError):
            pass

        assert explain(OddError("x"))[0].hint == explain(DiskConflictError("x"))[0].hint != ""
        assert explain(MachineError("x"))[0].hint != explain(BackendError("x"))[0].hint
        assert explain(HotlunError("x"))[0].hint == ""
        assert explain(HotlunError("x"))[0].more == ()

    def test_in_groups_are_told_one_by_one(
        self, ctx: click.Context, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """What `release_all` could not release is a line each."""
        with pytest.raises(click.exceptions.Exit) as ended, translated(ctx):
            raise ExceptionGroup("two", [HotlunError("one"), ExceptionGroup("", [OSError("two")])])
        assert ended.value.exit_code == 1
        assert capsys.readouterr().err == "error: one\nerror: two\n"

    def test_that_are_mistakes_of_ours_keep_their_traceback(self, ctx: click.Context) -> None:
        """Nobody is told a bug as if it were their doing."""
        with pytest.raises(ZeroDivisionError), translated(ctx):
            raise ZeroDivisionError
        with pytest.raises(ExceptionGroup), translated(ctx):
            raise ExceptionGroup("two", [HotlunError("one"), ZeroDivisionError()])

    def test_on_a_closed_pipe_are_left_to_click(self, ctx: click.Context) -> None:
        """`hotlun ... | head` ends without a word."""
        with pytest.raises(BrokenPipeError), translated(ctx):
            raise BrokenPipeError

    @pytest.mark.parametrize(
        ("error", "code"),
        [(KeyboardInterrupt(), 130), (TerminatedError(signal.SIGTERM), 143)],
        ids=["ctrl-c", "sigterm"],
    )
    def test_by_a_signal_have_its_code(
        self, ctx: click.Context, error: BaseException, code: int
    ) -> None:
        """A shell sees what it would see of a program that the signal had ended."""
        with pytest.raises(click.exceptions.Exit) as ended, translated(ctx):
            raise error
        assert ended.value.exit_code == code

    def test_have_a_traceback_with_debug(self) -> None:
        """`--debug` shows where it came from, before or after the command's name."""
        for arguments in (
            ["--debug", "vm", "run", "x", "true"],
            ["vm", "run", "--debug", "x", "y"],
        ):
            result = hotlun(*arguments)
            assert result.exit_code == 1
            assert "Traceback" in result.stderr
        assert "Traceback" not in hotlun("vm", "run", "x", "y").stderr

    @pytest.mark.parametrize(("no_color", "is_red"), [("", True), ("1", False)])
    def test_are_red_unless_told_not_to(
        self, monkeypatch: pytest.MonkeyPatch, no_color: str, is_red: bool
    ) -> None:
        """On a terminal, that is; NO_COLOR is respected."""
        monkeypatch.setenv("NO_COLOR", no_color)
        result = CliRunner().invoke(main, ["vm", "run", "x", "y"], color=True)
        assert ("\x1b[31m" in result.stderr) is is_red


class TestTheLog:
    def test_is_shown_with_debug_only(self) -> None:
        """Each step is told with `--debug`; without, only what is wrong, and what a VM's takes."""

        @main.command("log")
        def command() -> None:
            logging.getLogger("hotlun").debug("a step")
            logging.getLogger("hotlun.vm").info("this takes a minute")

        try:
            assert hotlun("log").stderr == "this takes a minute\n"
            assert "a step" in hotlun("--debug", "log").stderr
        finally:
            del main.commands["log"]

    def test_is_as_before_afterwards(self) -> None:
        """A command leaves no handler and no level behind."""
        logger = logging.getLogger("hotlun")
        before = (logger.level, list(logger.handlers))
        hotlun("--debug", "vm", "list")
        assert (logger.level, logger.handlers) == before


class TestRunning:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
    def test_is_ended_by_a_signal_after_cleaning_up(self, number: signal.Signals) -> None:
        """A command that is told to end undoes what it did, and says by what it was ended."""
        done = []

        async def main() -> None:
            try:
                os.kill(os.getpid(), number)
                await asyncio.sleep(60)
            finally:
                done.append("cleaned up")

        before = signal.getsignal(number)
        with pytest.raises(TerminatedError) as ended:
            run(main())
        assert (ended.value.number, done) == (number, ["cleaned up"])
        assert signal.getsignal(number) == before

    def test_gives_back_what_the_coroutine_returns(self) -> None:
        """The usual end."""

        async def main() -> int:
            return 7

        assert run(main()) == 7


class TestAgent:
    def test_is_built_into_one_executable_file(self, tmp_path: Path) -> None:
        """The file runs by itself, without hotlun."""
        target = tmp_path / "agent"
        result = hotlun("agent", "build", str(target))
        assert result.exit_code == 0
        assert str(target) in result.output
        assert target.stat().st_mode & stat.S_IXUSR
        done = subprocess.run(
            [sys.executable, "-I", "-S", target, "--help"], capture_output=True, check=True
        )
        assert b"--port" in done.stdout


def test_no_vm_is_an_empty_list() -> None:
    """`vm list` with nothing to list says so, and not where a script would read it."""
    result = hotlun("vm", "list")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "no VM runs" in result.stderr


def drawn(picture: object, *, encoding: str = "utf-8", **options: bool) -> str:
    """What a terminal of 80 columns gets to see."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(file=file, width=80, highlight=False, **options).print(picture)  # type: ignore[arg-type]
    file.seek(0)
    return file.read()


class TestTheSlotMap:
    SLOTS = tuple(
        SlotStatus(
            Slot(controller, lun),
            {
                (0, 0): SlotState.RESERVED,
                (0, 1): SlotState.TAKEN,
                (1, 8): SlotState.QUARANTINED,
                (3, 63): SlotState.TAKEN,
            }.get((controller, lun), SlotState.FREE),
        )
        for controller in range(4)
        for lun in range(64)
    )

    def test_has_a_row_a_controller_and_a_sign_a_lun(self) -> None:
        """4 x 64 slots fit 80 columns, and each state has a sign of its own."""
        ruler, *rows, legend = drawn(SlotMap(self.SLOTS)).splitlines()
        assert ruler.split() == ["LUN", *(str(lun) for lun in range(0, 64, 8))]
        assert [row.split()[0] for row in rows] == ["0", "1", "2", "3"]
        signs = ["".join(row.split()[1:]) for row in rows]
        assert [len(row) for row in signs] == [64] * 4
        assert signs[0] == "□■" + "·" * 62
        assert signs[1] == "·" * 8 + "✗" + "·" * 55
        assert signs[3] == "·" * 63 + "■"
        for entry in ("· free 252", "■ taken 2", "□ reserved 1", "✗ quarantined 1"):
            assert entry in legend

    def test_counts_luns_above_its_signs(self) -> None:
        """A number of the ruler stands above the LUN that it names."""
        ruler, _, row, *_ = drawn(SlotMap(self.SLOTS)).splitlines()
        assert ruler.index("8 ") == row.index("✗")

    def test_is_plain_where_it_must_be(self) -> None:
        """No control codes in a file, no character that ASCII lacks where that is all there is."""
        assert "\x1b" not in drawn(SlotMap(self.SLOTS))
        assert "#" in drawn(SlotMap(self.SLOTS), encoding="ascii")
        assert "\x1b" in drawn(SlotMap(self.SLOTS), force_terminal=True)

    def test_has_the_vms_own_shape(self) -> None:
        """Fewer controllers or LUNs are fewer rows or signs."""
        slots = [SlotStatus(Slot(0, lun), SlotState.FREE) for lun in range(3)]
        _, row, _ = drawn(SlotMap(slots)).splitlines()
        assert row.split() == ["0", "···"]


def test_the_table_of_shares_names_everybody() -> None:
    """A row for each guest mount, with all who share it."""
    share = Share("web.vhdx", "0:1", "sdb", "/run/mounts/scsi/m0", "ext4, rw", ["web", "backup"])
    table = drawn(share_table([share, share._replace(holders=["[bold]x"])]))
    assert "web, backup" in table
    assert "[bold]x" in table
    assert "/run/mounts/scsi/m0" in table


class TestTheReport:
    @pytest.fixture
    def file(self) -> io.StringIO:
        return io.StringIO()

    @pytest.fixture
    def report(self, file: io.StringIO) -> Report:
        return Report(show_code=True, console=Console(file=file, width=80, highlight=False))

    def test_fails_with_the_claim_that_does_not_hold(self, report: Report) -> None:
        """A check is an error with its words, which ends the demo."""
        report.check(True, "the sun rises")
        with pytest.raises(CheckFailedError, match="and is not: the moon sets"):
            report.check("", "the moon sets")

    async def test_tells_chapters_with_titles_code_and_time(
        self, report: Report, file: io.StringIO
    ) -> None:
        """Title, source, what was done and checked, how long, and the sum at the end."""

        async def chapter() -> None:
            """A title"""
            with report.doing("something [slow]"):
                pass
            report.check(1, "it was done")

        await report.chapter(chapter)
        report.end("all well")
        told = file.getvalue()
        assert " 1 A title\n" in told
        assert 'with report.doing("something [slow]"):' in told
        assert "  something [slow]\n" in told
        assert "it was done\n" in told
        assert "1 checks, 0." in told
        assert "all well" in told
        assert "\x1b" not in told

    def test_is_plain_where_it_must_be(self) -> None:
        """A terminal that knows only ASCII gets nothing else."""
        file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        report = Report(console=Console(file=file, width=80, highlight=False))
        report.check(True, "the sun rises")
        file.seek(0)
        assert file.read() == "   + the sun rises\n"

    def test_shows_errors_as_the_command_line_does(self, report: Report, file: io.StringIO) -> None:
        """A refusal in the demo looks as its users will see it."""
        report.refused(DiskConflictError("the disk is in use"))
        assert "error: the disk is in use\n" in file.getvalue()
        assert "hint: " in file.getvalue()


class TestADemoThatCannotBe:
    def test_names_what_is_missing(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Without qemu-img the package is named, and nothing is left."""
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        result = hotlun("demo")
        assert result.exit_code == 1
        assert "install the package qemu-utils" in result.stderr
        assert not list(tmp_path.glob("hotlun-*"))

    @pytest.mark.qemu
    def test_fails_when_a_check_does(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """With an sfdisk that does nothing there is no partition table: exit code 1, and why."""
        fake = tmp_path / "sfdisk"
        fake.write_text("#!/bin/sh\n", encoding="ascii")
        fake.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        result = hotlun("demo")
        assert result.exit_code == 1
        assert "this should be so, and is not: parts.img" in result.stderr
